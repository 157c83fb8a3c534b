"""Writes what a run trained into a folder for stock code, and proves it there before the folder gets its name."""

import copy
import importlib.util
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.checkpoint.bundle import delete
from launcher.checkpoint.files import read_object, write_text
from launcher.data.prepare import PreparedData, prepare
from launcher.errors import RecipeError
from launcher.export.card import CARD, export_card
from launcher.export.limits import limits_of
from launcher.export.load_run import OpenedRun, free_memory, load_trained
from launcher.export.merge import MergePlan, check_space, plan_merge, read_updates, write_merged
from launcher.export.place import UNPROVEN_SUFFIX
from launcher.export.proof import (
    ModelOutputs,
    Probe,
    chat_verdict,
    figure_verdicts,
    figures_of,
    make_probe,
    measured,
    pairs_of,
    stop_verdict,
)
from launcher.export.weights import adapter_verdict, weights_verdict
from launcher.memory.ledger import Ledger
from launcher.model.build import DTYPES
from launcher.model.load import load_stop_ids, load_tokenizer, stop_ids_of
from launcher.recipe.run_options import ExportOptions
from launcher.records.export import ExportLimits, ExportRecord
from launcher.records.run import Phase, Verdict
from launcher.runtime.clock import Clock
from launcher.train.describe import slow_dtype_note

PART_SUFFIX = ".part"


@dataclass
class _Work:
    """An export on its way."""

    run: OpenedRun
    options: ExportOptions
    to: Path
    staging: Path  # of this export alone
    plan: MergePlan | None  # None: the adapter alone
    gguf: Any  # GgufPlan; None in another format
    clock: Clock
    done: int = 0  # weights written
    peak_mib: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the written weights."""
        return self.plan.dtype if self.plan else torch.float32

    @property
    def gguf_file(self) -> Path:
        return self.staging / f"{self.to.name}-{self.options.quantization}.gguf"


def export(run: OpenedRun, options: ExportOptions, to: Path) -> Iterator[str | Phase | ExportRecord]:
    """Write `to` and prove it; yields the names of phases and, last, the record. `to` exists only if all verdicts hold;
    else the folder has .unproven at the end of its name. What fails on the way leaves nothing.

    Raises RecipeError, DiskError, MemoryExhausted, and what the base and the data raise.
    """
    plan = gguf = None
    if options.format != "adapter":
        plan = plan_merge(run, on=options.on, dtype=_written_dtype(run, options))
        if options.format == "gguf":
            from launcher.export.gguf_file import check_proof_memory, plan_gguf  # gguf is an extra

            gguf = plan_gguf(plan, options.quantization)
            check_proof_memory(gguf)
        check_space(gguf.nbytes if gguf else plan.nbytes, to)
    work = _Work(run, options, to, _staging(to), plan, gguf, Clock(), notes=list(run.notes))
    try:
        yield "reading data"
        with work.clock.phase("data"):
            probe = make_probe(prepared_data(run))
        yield Phase("writing", lambda: f"{work.done} of {len(work.plan.shapes)} weights" if work.plan else "")
        with work.clock.phase("write"):
            _write(work)
            work.peak_mib = Ledger(torch.device("cpu")).peak_mib()
        yield f"trained model: {len(probe.documents)} documents"
        with work.clock.phase("trained model"):
            trained, loaded = _measure_trained(work, probe)
        yield f"written model: {len(probe.documents)} documents"
        with work.clock.phase("written model"):
            written, found = _measure_written(work, probe)
            if gguf:
                found += _measure_llama_cpp(work, probe, trained)
        record = _with_card(work, _record(work, probe, trained, written, [*loaded, *found]))
        work.staging.rename(record.folder)  # raises where something stands there by now, but for an empty folder
    except BaseException:
        delete(work.staging)
        raise
    yield record


def _staging(to: Path) -> Path:
    """A new folder beside `to`."""
    to.parent.mkdir(parents=True, exist_ok=True)
    staging = to.with_name(f"{to.name}.{secrets.token_hex(4)}{PART_SUFFIX}")  # mkdtemp's are the owner's alone
    staging.mkdir()
    return staging


def _written_dtype(run: OpenedRun, options: ExportOptions) -> torch.dtype:
    if options.format == "gguf":
        return torch.float32  # before it is rounded to a type of GGUF's
    trained = DTYPES[run.place.dtype]
    return DTYPES[options.dtype] if options.dtype != "auto" else trained if trained.itemsize == 2 else torch.bfloat16


def prepared_data(run: OpenedRun, *, instead: str = "") -> PreparedData:
    """The run's data again, mostly from the cache. Raises RecipeError where the recipe of the run is not whole, with
    what can be done `instead`."""
    recipe = run.place.recipe
    if not run.place.finished:
        raise RecipeError(
            "a run's own data is found by the paths in the report.json of a finished run; "
            f"{run.place.folder} has none.\nA checkpoint knows its data by a digest, which names no file.\n"
            f"Let the run come to its end: it goes on with run.resume=auto.{instead}"
        )
    tokenizer = load_tokenizer(run.source, recipe.model, stand_in=Path())
    return prepare(recipe.data, tokenizer, seed=recipe.train.seed, stop_ids=load_stop_ids(run.source, recipe.model))


def _write(work: _Work) -> None:
    run, folder = work.run, work.staging

    def count(done: int) -> None:
        work.done = done

    if work.gguf:
        _write_gguf(work, count)
        return
    config, generation = copy.deepcopy(run.config), copy.deepcopy(run.generation)
    if work.plan:
        updates, shard_bytes = read_updates(run.place.adapter), work.options.shard_mib * 2**20
        write_merged(work.plan, updates, folder, shard_bytes=shard_bytes, progress=count)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = work.plan.dtype
    else:
        shutil.copytree(run.place.adapter, folder, dirs_exist_ok=True)
    config.use_cache = True
    config.save_pretrained(str(folder))
    run.tokenizer.save_pretrained(str(folder))
    stops = run.stop_ids
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    generation.to_json_file(folder / "generation_config.json")  # save_pretrained refuses settings that many bases have
    free_memory(run.device)


def _write_gguf(work: _Work, progress: Callable[[int], object]) -> None:
    from launcher.export.gguf_file import positions_of, write_gguf
    from launcher.export.modelfile import modelfile

    run, vocabulary = work.run, work.gguf.vocabulary
    write_gguf(work.gguf, read_updates(run.place.adapter), work.gguf_file, progress=progress)
    stops: Any = run.tokenizer.convert_ids_to_tokens(run.stop_ids)
    text, told = modelfile(run.tokenizer, work.gguf_file.name, stops, adds_bos=vocabulary.bos)
    (work.staging / "Modelfile").write_text(text, encoding="utf-8")
    work.notes += [*vocabulary.notes, f"the Modelfile has {told}"]
    if positions_of(run) < run.config.max_position_embeddings:
        work.notes.append(f"llama.cpp has no sliding window here: the file says {positions_of(run):,} positions")
    free_memory(run.device)


def _measure_trained(work: _Work, probe: Probe) -> tuple[ModelOutputs, list[Verdict]]:
    model, loaded = load_trained(work.run)
    verdicts = [loaded] if loaded else []
    if work.gguf:
        from launcher.export.gguf_proof import gguf_weights_verdict

        verdicts.append(gguf_weights_verdict(model, work.gguf, work.gguf_file))
    elif work.plan:
        verdicts.append(weights_verdict(model, work.plan, work.staging))
    else:
        verdicts.append(adapter_verdict(work.run.place.adapter, work.staging))
    found = measured(model, probe, stop_ids=work.run.stop_ids)
    del model
    free_memory(work.run.device)
    return found, verdicts


def _measure_written(work: _Work, probe: Probe) -> tuple[ModelOutputs, list[Verdict]]:
    run, folder = work.run, str(work.staging)
    verdicts: list[Verdict] = []
    tokenizer: Any = None
    if work.gguf:
        from launcher.export.gguf_proof import load_gguf

        model, tokenizer, generation, verdicts, notes = load_gguf(run, work.gguf_file)
        work.notes += notes
    elif work.plan:
        note = slow_dtype_note(work.plan.dtype, run.device)
        if note:
            work.notes.append(
                f"the written {str(work.plan.dtype)[6:]} weights are computed with in float32 on this CPU"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if note else "auto",
            device_map="auto" if run.device.type == "cuda" else {"": run.device},
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        wrong = [name for names in info.values() for name in names]
        evidence = f"stock transformers fills every weight; {len(wrong)} are missing, left over or of another shape"
        verdicts.append(Verdict("the folder loads whole", not wrong, evidence))
        generation = model.generation_config
    else:
        model, _ = load_trained(run, work.staging)
        generation = GenerationConfig.from_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = measured(model.eval(), probe, stop_ids=stop_ids_of(generation))
    del model
    free_memory(run.device)
    return found, [*verdicts, chat_verdict(run, tokenizer, probe), stop_verdict(run, tokenizer, generation)]


def _measure_llama_cpp(work: _Work, probe: Probe, trained: ModelOutputs) -> list[Verdict]:
    if importlib.util.find_spec("llama_cpp") is None:
        work.notes.append("llama-cpp-python is not installed: the file was read by Transformers alone")
        return []
    from launcher.export.gguf_proof import llama_cpp_verdict

    return [llama_cpp_verdict(work.run, work.gguf_file, probe, trained, _limits(work))]


def _limits(work: _Work) -> ExportLimits:
    options = work.options
    quantization = options.quantization if work.gguf else ""
    return limits_of(on=options.on if work.plan else "", dtypes=(work.run.dtype, work.dtype), quantization=quantization)


def _record(
    work: _Work, probe: Probe, trained: ModelOutputs, written: ModelOutputs, found: list[Verdict]
) -> ExportRecord:
    run, merged = work.run, work.plan is not None
    figures = figures_of(trained, written, probe)
    limits = _limits(work)
    verdicts = (*found, *figure_verdicts(figures, limits))
    holds = all(verdict.holds for verdict in verdicts)
    names: Any = run.tokenizer.convert_ids_to_tokens(run.stop_ids)
    return ExportRecord(
        run=str(run.place.adapter),
        base=run.source,
        folder=str(work.to if holds else work.to.with_name(work.to.name + UNPROVEN_SUFFIX)),
        format=work.options.format,
        on=work.options.on if merged else "",
        dtype=work.options.quantization if work.gguf else str(work.dtype)[6:],
        trained_dtype=str(run.dtype)[6:],
        device="CPU" if run.device.type == "cpu" else torch.cuda.get_device_name(run.device),
        files=_sizes(work.staging),
        data=probe.source,
        limits=limits,
        figures=figures,
        answers=pairs_of(trained, written, probe, run),
        stop_tokens=tuple(map(str, names)),
        peak_mib=work.peak_mib,
        elapsed_s=work.clock.elapsed_s,
        verdicts=verdicts,
        notes=tuple(work.notes),
    )


def _with_card(work: _Work, record: ExportRecord) -> ExportRecord:
    """The record, once the folder has its card. One that cannot be written is a note: the model is there."""
    place = work.run.place
    try:
        report = read_object(place.folder / "report.json")
        step, eval_loss = place.checkpoint_step, place.eval_loss
        write_text(work.staging / CARD, export_card(record, report, checkpoint=step, eval_loss=eval_loss))
    except Exception as error:  # of libraries too
        note = f"the folder has no card of the export: {type(error).__name__}: {error}"
        return replace(record, notes=(*record.notes, note))
    return replace(record, files=_sizes(work.staging))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of its files, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
