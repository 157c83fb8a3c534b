"""The folder of a finished run as far as its card and a push need it, made without training."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from launcher.checkpoint.files import write_json
from launcher.recipe.schema import Recipe
from launcher.records.export import ExportFigures, ExportLimits, ExportRecord
from launcher.records.run import Verdict
from tests.support.records import run_record, start_record

SAVED = Verdict("saved adapter reloads", True, "loss 1.500000 trained, 1.500000 reloaded from disk")
FAILED = Verdict("training lowered the loss", False, "eval loss 1.0 before, 2.0 after; see /home/me/hidden/log.txt")
BASE = "unsloth/Llama-3.2-1B-Instruct"


FIGURES = ExportFigures(
    documents=64, tokens=1543, positions=1000, trained_loss=1.5, written_loss=1.51, largest_logit_difference=0.2,
    mean_logit_difference=0.01, mean_kl=2e-5, largest_kl=1e-3, agreement=0.995, disagreement=0.001,
)  # fmt: skip
EXPORTED = ExportRecord(
    run="/home/me/hidden/run/adapter", base=BASE, folder="/home/me/hidden/out", format="merged", on="dequantised",
    dtype="bfloat16", trained_dtype="float32", device="CPU", files={}, data="64 documents of validation",
    limits=ExportLimits(loss=0.1, kl=1e-3, disagreement=0.02), figures=FIGURES, answers=(), stop_tokens=(),
    peak_mib=512, elapsed_s={}, verdicts=(Verdict("the loss is the trained model's", True, "near"),),
)  # fmt: skip


def report_of(*verdicts: Verdict, start: dict[str, Any] | None = None, **recipe: dict[str, Any]) -> dict[str, Any]:
    """The content of report.json of a run on BASE; sections of the recipe and facts of its start may be changed."""
    sections = {
        "model": {"name": BASE},
        "data": {"sources": [{"path": "/home/me/hidden/chats.jsonl"}, {"path": "owner/set", "split": "train[:9]"}]},
        "train": {"steps": 8, "lr": 1e-3},
        **recipe,
    }
    resolved = Recipe.model_validate(sections).model_dump(mode="json")
    record = run_record(
        recipe=resolved,
        start=start_record(**{"recipe": "/home/me/hidden/own.yaml", "run_dir": "/home/me/hidden/run", **(start or {})}),
        verdicts=(*verdicts, SAVED),
        data={"rows_read": 3_600, "rows_dropped_no_answer": 8},
        versions={"torch": "2.13.0"},
        notes=("data: left out in /home/me/hidden/chats.jsonl: 8",),
    )
    return json.loads(json.dumps(record.as_report()))


def finished_run(folder: Path, *verdicts: Verdict, **changes: Any) -> Path:
    """A run's folder: report and adapter, with PEFT's placeholder of a card, and what must not be pushed."""
    adapter = folder / "adapter"
    (adapter / "checkpoints" / "step-8").mkdir(parents=True)
    write_json(folder / "report.json", report_of(*verdicts, **changes))
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": BASE})
    import numpy

    save_file({"a": numpy.arange(70_000, dtype=numpy.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "README.md").write_text("---\ntags:\n- lora\n---\n# Model Card for Model ID\n")
    (adapter / "tokenizer_config.json").write_text("{}")
    for name in ("optimizer.pt", "metrics.jsonl", "run.lock", "report.json.1.part", "checkpoints/step-8/state.json"):
        (adapter / name).write_text("not to be pushed")
    (adapter / "LICENSE").symlink_to(folder / "report.json")
    (folder / "run.lock").touch()
    return folder
