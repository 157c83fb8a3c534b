"""Model cards: what a run's report and an export's record say of the model, as the README.md beside its weights.

A card names no path of the machine that made it, only last components, and no credential. Imports no torch.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.credentials import masked
from launcher.export.told_names import name_told, paths_of, value_told, without_folders
from launcher.recipe.schema import Recipe
from launcher.records.counts import counts_in_words
from launcher.records.export import ExportRecord

CARD, OUR_TAG, UNPROVEN_TAG = "README.md", "qlora-launcher", "unproven"
TOLD_APART = ("model.name", "model.revision", "data.sources", "data.validation")  # keys with a line of their own
SECTIONS_TOLD = ("model", "quant", "lora", "data", "train")  # the others do not change what is learned
EXPORT_KINDS = {  # by format of an export: library, relation to the base, what it is
    "merged": ("transformers", "finetune", "A whole model: base and adapter merged into 16-bit or 32-bit weights."),
    "gguf": ("gguf", "quantized", "A whole model as one GGUF file, with its tokenizer and chat template."),
    "adapter": ("peft", "adapter", "A LoRA adapter with the config, generation config and tokenizer of its base."),
}
LOAD_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{here}")"""
LOAD_GGUF = """# llama.cpp, with the file of this folder; or Ollama: ollama create my-model -f Modelfile
llama-cli -m {here}/*.gguf"""
LOAD_ADAPTER = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{quant}",
    bnb_4bit_use_double_quant={double},
    bnb_4bit_compute_dtype=torch.{dtype},
)
base = AutoModelForCausalLM.from_pretrained("{base}", {revision}quantization_config=nf4, device_map="auto")
model = PeftModel.from_pretrained(base, "{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")"""
CACHED = "read from the cache of an earlier run"  # a note that tells nothing of the model
HERE = "FOLDER-OR-ID-OF-THIS-MODEL"


def run_card(report: Mapping[str, Any]) -> str:
    """The card of a run's adapter, from the content of its report.json."""
    base, verdicts = _Base(report), report["verdicts"]
    lead = f"A LoRA adapter of {base.words}, trained on it in {base.start['quantization']} (QLoRA)."
    sections = [*_failing(verdicts), lead, *_load(LOAD_ADAPTER, base), *_run_sections(report, base)]
    return _card(report, base, ("peft", "adapter"), _evaluation(report), holds=_hold(verdicts), sections=sections)


def export_card(
    record: ExportRecord, report: Mapping[str, Any], *, checkpoint: int | None = None, eval_loss: float | None = None
) -> str:
    """The card of an exported folder: what it is, how it was proved, and the run (its report.json) that it is of.

    `checkpoint`: its step, where the adapter is not the run's own; `eval_loss`: then the checkpoint's, if it has one.
    """
    of = ""
    if checkpoint is not None:
        of = f" This is the checkpoint of step {checkpoint:,} of {report['start']['steps']:,}."
        report = {**report, "checkpoint": checkpoint, "loss": {**report["loss"], "eval_adapter": eval_loss}}
    base, verdicts = _Base(report), [vars(verdict) for verdict in record.verdicts]
    base.paths += [record.run, record.folder, *([record.base] if base.local else [])]
    library, relation, what = EXPORT_KINDS[record.format]
    weights = "NF4 base as training saw it" if record.on == "dequantised" else "weights of the base's files"
    on = f" The update was added to the {weights} (`on={record.on}`)." if record.on else ""
    figures, limits = record.figures, record.limits
    compared = [
        ("loss of the trained model, nats", figures.trained_loss, ""),
        ("loss of this one, nats", figures.written_loss, ""),
        ("difference of the losses", figures.loss_difference, f"{figures.loss_limit(limits):.2g}"),
        ("mean KL, nats", figures.mean_kl, f"{limits.kl:g}"),
        ("another likeliest token, beyond a tie", figures.disagreement, f"{limits.disagreement:g}"),
        ("same likeliest token", figures.agreement, ""),
    ]
    proof = (
        f"Loaded by stock code and compared with the trained model ({base.start['quantization']} base and adapter) on "
        f"{record.data}: {figures.tokens:,} tokens, on {record.device}. Weights: {record.dtype}."
    )
    load = {"merged": LOAD_MERGED, "adapter": LOAD_ADAPTER, "gguf": LOAD_GGUF}[record.format]
    sections = [
        *_failing(verdicts),
        f"{what}{on} It was trained on {base.words}.{of}",
        *_load(load, base),
        "## Proof of the export",
        proof,
        _table(("", "found", "limit"), [(name, f"{value:.6g}", limit) for name, value, limit in compared]),
        _verdicts(verdicts),
        *(" ".join(note.split()) for note in record.notes),
        *_run_sections(report, base, kind=record.format),
    ]
    holds = _hold(verdicts) and _hold(report["verdicts"])
    measured = _evaluation(report) if record.format == "adapter" else None  # the run's loss is not a merged model's
    return _card(report, base, (library, relation), measured, holds=holds, sections=sections)


class _Base:
    """The base of a run, as far as it may be told."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.start, model = report["start"], report["recipe"]["model"]
        source = self.start["model"].removesuffix(" (random weights)")
        self.random, self.local = model["init"] == "random", os.path.isabs(source)
        self.name = masked(Path(source).name if self.local else source)
        self.revision = None if self.local else model["revision"]
        self.paths = list(paths_of(report))
        self.license: dict[str, Any] = {} if self.random else _license(source)
        where = "a folder of the machine that trained it" if self.local else self.revision or "no revision was named"
        self.words = f"`{self.name}` ({'random weights' if self.random else where}; {self.start['family']})"


def _license(source: str) -> dict[str, str]:
    """What the base's own card says of its licence, where this machine has the card."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card: Any = Path(source) / CARD if os.path.isabs(source) else try_to_load_from_cache(source, CARD)
    try:
        data = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # there is none, or it is of any form: nothing is known
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)} if found["license"] else {}


def _card(
    report: Mapping[str, Any], base: _Base, kind: tuple[str, str], measured: Any, *, holds: bool, sections: Any
) -> str:
    from huggingface_hub import ModelCardData

    library, relation = kind
    known = not (base.local or base.random)  # the hub refuses a base that is no id of its own
    name = f"{base.name.rpartition('/')[2]}-{Path(base.start['recipe']).name.removesuffix('.yaml')}"
    data = ModelCardData(
        base_model=base.name if known else None,
        base_model_relation=relation if known else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lora", "qlora", OUR_TAG, *([] if holds else [UNPROVEN_TAG])],
        model_name=name,
        eval_results=measured,
        **base.license,
    )
    text = "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {name}", *filter(None, sections)]) + "\n"
    return without_folders(text, base.paths, run_dir=base.start["run_dir"])


def _evaluation(report: Mapping[str, Any]) -> Any:
    """The eval loss for the front matter; None where there is none of this adapter."""
    from huggingface_hub import EvalResult

    value = _adapter_loss(report)
    if value is None or not math.isfinite(value):
        return None
    names = ", ".join(name_told(source["path"]) for source in report["recipe"]["data"]["sources"])
    of = EvalResult("text-generation", "validation", f"validation rows of {names}", "loss", round(value, 6))
    of.metric_name = "eval loss"
    return [of]


def _adapter_loss(report: Mapping[str, Any]) -> float | None:
    """The eval loss of the card's adapter; reports of an earlier day lack that of the best checkpoint's."""
    loss = report["loss"]
    found: float | None = loss.get(
        "eval_adapter", None if report["recipe"]["train"].get("keep_best") else loss["eval_last"]
    )
    return found


def _load(code: str, base: _Base) -> Iterable[str]:
    if base.random:
        return
    quant = base.start["quantization"]
    filled = code.format(
        here=HERE,
        base=base.name if not base.local else f"FOLDER-OF/{base.name}",
        quant="nf4" if "nf4" in quant else "fp4",
        double="double" in quant,
        dtype=base.start["dtype"],
        revision=f'revision="{base.revision}", ' if base.revision else "",
    )
    yield f"## Load it\n\n```{'sh' if code == LOAD_GGUF else 'python'}\n{filled}\n```"


def _run_sections(report: Mapping[str, Any], base: _Base, *, kind: str = "adapter") -> Iterable[str]:
    yield from _data(report)
    yield from _training(report)
    yield "## Verdicts of the run"
    yield _verdicts(report["verdicts"])
    if kind != "gguf":  # which nothing trains on
        yield "## Go on"
        other = "`model.name=` this folder" if kind == "merged" else "merge it first with `mode=export`"
        yield f"On the same data: more `train.steps` in the run's folder. On other data: {other}. See docs/adapter.md."
    yield "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(report, base))


def _data(report: Mapping[str, Any]) -> Iterable[str]:
    start, data = report["start"], report["recipe"]["data"]
    rows = [
        (name_told(one["path"]), one.get("split") or "", one.get("format") or "", str(one.get("weight") or ""))
        for one in data["sources"]
    ]
    yield "## Data"
    yield _table(("source", "split", "format", "weight"), rows)
    validation = data["validation"]
    held = name_told(validation["path"]) if isinstance(validation, dict) else validation
    trained = "a stream" if start["streamed"] else f"{start['train_rows']:,} rows to train on"
    yield f"{trained}, {start['validation_rows']:,} to validate (`data.validation`: {held})."
    counts = {key: count for key, count in report["data"].items() if count}
    yield f"Counted: {counts_in_words(counts)}." if counts else ""


def _training(report: Mapping[str, Any]) -> Iterable[str]:
    start, loss, ranks = report["start"], report["loss"], report["ranks"]
    yield "## Training"
    own, checkpoint = _adapter_loss(report), report.get("checkpoint")
    rows = [["loss", "first"], ["training", _number(loss["first"])], ["validation", _number(loss["eval_first"])]]
    columns = [("last", _number(loss["last"]), _number(loss["eval_last"]))] if checkpoint is None else []
    if own is not None and (checkpoint is not None or own != loss["eval_last"]):
        columns.append(("this adapter", "-", _number(own)))
    yield _table([*rows[0], *(c[0] for c in columns)], [[*rows[n], *(c[n] for c in columns)] for n in (1, 2)])
    yield "What follows, and the verdicts, are of the whole run." if checkpoint is not None else ""
    peak = max(rank["vram"]["peak_mib"] for rank in ranks)
    what = "resident memory" if start["device"].lower().startswith("cpu") else "allocated memory"
    seconds = sum(report["elapsed_s"].values())
    yield (
        f"{start['steps']:,} steps ({start['optimizer']}) on {start['world_size']} × {start['device']}, computing in "
        f"{start['dtype']}: {seconds:,.0f} s in all, {peak:,.0f} MiB of {what} at most. Compiled: {start['compile']}."
    )
    stopped = report.get("stopped")
    yield f"It stopped {stopped}." if stopped else ""
    yield "What differs from the defaults:"
    yield "```\n" + "\n".join(_changed_keys(report["recipe"])) + "\n```"
    versions = report.get("versions") or {}
    yield "Versions: " + (", ".join(f"{name} {of}" for name, of in versions.items()) or "not recorded") + "."


def _changed_keys(recipe: Mapping[str, Any]) -> Iterable[str]:
    """ "train.lr=0.001" for each key that is not at its default."""
    defaults = Recipe.model_validate({"train": {"steps": 1}}).model_dump(mode="json")
    for section in SECTIONS_TOLD:
        for key, value in recipe[section].items():
            name, default = f"{section}.{key}", defaults.get(section, {}).get(key)
            if name not in TOLD_APART and (value != default or name == "train.steps"):
                yield f"{name}={value_told(value)}"


def _limits(report: Mapping[str, Any], base: _Base) -> Iterable[str]:
    start = report["start"]
    if base.random:
        yield "The base had random weights, which exist nowhere: this adapter fits no model."
    if base.local:
        yield f"The base was a folder, `{base.name}`: this card does not know whether and where it is published."
    elif not base.revision:
        yield "No revision of the base was named: its commit was the newest that the machine had."
    if not base.license:
        yield "The licence of the base is not known to this card, and so none is given."
    if "checkpoint" in report and _adapter_loss(report) is None:
        yield "The run did not evaluate this checkpoint."
    elif start["validation_rows"]:
        yield f"It was evaluated by its loss on {start['validation_rows']:,} rows alone."
    else:
        yield "It was not evaluated: no row was held out."
    yield "Not known: rights, biases and private content of the data; how it behaves outside of what it was trained on."
    yield from (" ".join(note.split()) for note in (*start["notes"], *report["notes"]) if CACHED not in note)


def _failing(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    broken = [verdict["claim"] for verdict in verdicts if not verdict["holds"]]
    return [f"> **Unproven.** What does not hold: {'; '.join(broken)}. See the verdicts."] if broken else []


def _hold(verdicts: Sequence[Mapping[str, Any]]) -> bool:
    return all(verdict["holds"] for verdict in verdicts)


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    rows = [("PASS" if one["holds"] else "**FAIL**", one["claim"], one["evidence"]) for one in verdicts]
    return _table(("", "claim", "evidence"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
