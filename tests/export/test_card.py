"""Model cards: what they say, what they must not say, and that no run or export is lost for want of one."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from launcher.checkpoint import run_files
from launcher.checkpoint.files import write_json
from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.run_files import RunFiles
from launcher.export import write
from launcher.export.card import CARD, export_card, run_card
from launcher.records.run import RunOpened, Verdict
from tests.support.finished_runs import BASE, EXPORTED, FAILED, SAVED, report_of
from tests.support.records import run_record


def card_of(report: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Front matter and text, as the hub's own reader takes them."""
    card = ModelCard(run_card(report))
    return card.data.to_dict(), card.text


def test_a_card_says_what_was_trained_on_what_how_and_what_holds() -> None:
    data, text = card_of(report_of(model={"name": BASE, "revision": "0123abc"}))
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter" and data["library_name"] == "peft"
    assert "qlora" in data["tags"] and "unproven" not in data["tags"] and "license" not in data
    [result] = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 1.4711 and "chats.jsonl" in result["dataset"]["name"]
    for part in (
        "0123abc", f'from_pretrained("{BASE}", revision="0123abc", quantization_config=nf4', "PeftModel", "chats.jsonl",
        "owner/set", "train[:9]", "3,412 rows to train on, 180 to validate", "8 rows dropped: no answer",
        "train.lr=0.001",
        "| training | 2.3810 | 1.7857 |", "| validation | 2.9134 | 1.4711 |", "2 × NVIDIA H200", "7,491 MiB",
        "torch 2.13.0", "| PASS | saved adapter reloads |", "The licence of the base is not known",
    ):  # fmt: skip
        assert part in text, part
    python = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert python and compile(python[1], "card", "exec")


def test_a_card_names_no_folder_of_the_machine_and_no_credential() -> None:
    token = "hf_" + "CanaryAb12" * 3
    base = {
        "model": f"/home/me/hidden/{token}-base",
        "notes": ("goes on from step 4 (/home/me/hidden/run/checkpoints/step-4)",),
    }
    report = report_of(FAILED, start=base, model={"name": "./base"}, run={"output_dir": "/home/me/hidden/run"})
    text = run_card(report)
    assert "hidden" not in text and "/home" not in text and token not in text
    data, _ = card_of(report)
    assert "base_model" not in data, "the hub refuses one that is no id"
    for part in ("`***-base`", "FOLDER-OF/***-base", "chats.jsonl", "…/log.txt", "run's folder/checkpoints/step-4"):
        assert part in text, part


def test_a_verdict_that_fails_stands_at_the_top_and_in_the_tags() -> None:
    data, text = card_of(report_of(FAILED))
    assert "unproven" in data["tags"] and "| **FAIL** | training lowered the loss |" in text
    assert text.index("**Unproven.** What does not hold: training lowered the loss") < text.index("## Load it")


def test_figures_are_the_adapters_or_none() -> None:
    best = report_of(train={"steps": 8, "keep_best": True, "save_every": 4, "eval_every": 4})
    best["loss"]["eval_adapter"] = 1.25
    data, text = card_of(best)
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.25
    assert "| loss | first | last | this adapter |" in text and "| validation | 2.9134 | 1.4711 | 1.2500 |" in text
    earlier, unknown = json.loads(json.dumps(best)), report_of()
    del earlier["loss"]["eval_adapter"]
    unknown["loss"]["eval_adapter"] = None
    for report in (earlier, unknown):
        assert "model-index" not in card_of(report)[0] and "this adapter" not in card_of(report)[1]


def test_an_exported_checkpoints_card_has_its_own_figures_or_none() -> None:
    adapter = replace(EXPORTED, format="adapter", on="")
    assert "model-index" not in ModelCard(export_card(EXPORTED, report_of())).data.to_dict(), "of a merged model"
    card = ModelCard(export_card(adapter, report_of(), checkpoint=2, eval_loss=2.5))
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]["value"] == 2.5
    assert "checkpoint of step 2 of 100" in card.text and "| validation | 2.9134 | 2.5000 |" in card.text
    assert "| loss | first | this adapter |" in card.text and "1.4711" not in card.content
    card = ModelCard(export_card(adapter, report_of(), checkpoint=2))
    assert "model-index" not in card.data.to_dict() and "| validation | 2.9134 |\n" in card.text
    assert "The run did not evaluate this checkpoint." in card.text and "1.4711" not in card.content


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/home/ann/secret client/rows.jsonl", "rows.jsonl"),
        ("file:/home/ann/secret/x.jsonl", "x.jsonl"),
        ("file:///home/ann/secret/x.jsonl", "x.jsonl"),
        ("secret-acme/rows.jsonl", "rows.jsonl"),
        ("../secret acme/rows.jsonl", "rows.jsonl"),
        ("~/secret acme/rows.jsonl", "rows.jsonl"),
        ("secret/acme", "acme"),
        ("/data/secret client/rows of/", "rows of"),
        ("owner/set", "owner/set"),
    ],
)
def test_private_names_of_folders_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    (tmp_path / "secret" / "acme").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    report = report_of(data={"sources": [{"path": path}]})
    whole = Path(path).expanduser()
    beside = whole.with_name("other rows.jsonl").absolute()
    report["notes"] = [f"data: left out in {path}: 8 ({whole}, {whole.absolute()})", f"see {beside}, /home/ann"]
    card = run_card(report)
    assert "secret" not in card and "/ann" not in card and f"| {said} |" in card
    assert f"left out in {said}" in card or "file:" in path


def test_random_weights_and_unknowns_are_said_and_a_known_licence_is_given(tmp_path: Path) -> None:
    random = report_of(start={"model": f"{BASE} (random weights)"}, model={"name": BASE, "init": "random"})
    data, text = card_of(random)
    assert "exist nowhere" in text and "## Load it" not in text and "base_model" not in data
    (tmp_path / CARD).write_text(
        "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\nlanguage: en\n---\n"
    )
    data, text = card_of(report_of(start={"model": str(tmp_path)}))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama3.2", "LICENSE")
    assert "licence of the base is not known" not in text and "language" not in data


@pytest.fixture
def opened(tmp_path: Path) -> tuple[RunFiles, RunFolder]:
    folder = RunFolder(tmp_path / "run")
    files = RunFiles(0, card=lambda record: f"card of {len(record.steps)} steps")
    folder.create()
    folder.adapter.mkdir()
    (folder.adapter / CARD).write_text("before")
    files.show(RunOpened(folder.path))
    return files, folder


def test_a_card_that_cannot_be_written_is_a_note_and_the_report_stays(
    opened: tuple[RunFiles, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, folder = opened
    record = run_record(verdicts=(SAVED,))
    assert files.with_pages(record) is record
    assert (folder.adapter / CARD).read_text() == f"card of {len(record.steps)} steps"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_files, "write_text", full)
        noted = files.with_pages(replace(record, steps=()))
    assert "README.md could not be written" in noted.notes[-1] and "No space left" in noted.notes[-1]
    files.show(noted)
    assert folder.report.exists() and (folder.adapter / CARD).read_text() == f"card of {len(record.steps)} steps"


def test_an_adapter_that_is_not_proven_keeps_the_card_that_it_had(opened: tuple[RunFiles, RunFolder]) -> None:
    files, folder = opened
    record = run_record(verdicts=(SAVED, FAILED))
    assert files.with_pages(record) is record and (folder.adapter / CARD).read_text() == "before"
    other = RunFiles(1, card=lambda _: "of rank 1")
    other.show(RunOpened(folder.path))
    other.with_pages(run_record(verdicts=(SAVED,)))
    assert (folder.adapter / CARD).read_text() == "before"


def test_an_exports_card_says_what_it_is_how_it_was_proved_and_of_which_run() -> None:
    card = ModelCard(export_card(EXPORTED, report_of()))
    data, text = card.data.to_dict(), card.text
    assert (data["library_name"], data["base_model_relation"], data["base_model"]) == ("transformers", "finetune", BASE)
    for part in (
        "merged into", "`on=dequantised`", "AutoModelForCausalLM", "| mean KL, nats | 2e-05 | 0.001 |",
        "| difference of the losses | 0.01 | 0.1 |", "| PASS | the loss is the trained model's | near |",
        "64 documents of validation: 1,543 tokens", "Verdicts of the run", "chats.jsonl",
    ):  # fmt: skip
        assert part in text, part
    assert "hidden" not in card.content and "unproven" not in data["tags"] and "PeftModel" not in text
    adapter = ModelCard(export_card(replace(EXPORTED, format="adapter", on=""), report_of()))
    assert adapter.data.to_dict()["library_name"] == "peft" and "PeftModel" in adapter.text
    far = replace(EXPORTED, verdicts=(Verdict("the loss is the trained model's", False, "far"),))
    for unproven in (export_card(far, report_of()), export_card(EXPORTED, report_of(FAILED))):
        assert "unproven" in ModelCard(unproven).data.to_dict()["tags"]
    other = ModelCard(export_card(replace(EXPORTED, format="gguf"), report_of()))
    assert other.data.to_dict()["library_name"] == "gguf" and "ollama create" in other.text


def test_a_run_and_an_export_end_with_their_cards(run_folder: Path, export: Any) -> None:
    run = ModelCard.load(run_folder / "adapter" / CARD)
    assert "qlora-launcher" in run.data.to_dict()["tags"] and "| PASS | saved adapter reloads |" in run.text
    assert "torch 2." in run.text and str(run_folder) not in run.content
    assert json.loads((run_folder / "report.json").read_text())["versions"]["torch"].startswith("2.")
    done = export("format=adapter")
    card = ModelCard.load(Path("out") / CARD)
    assert done.code == 0 and done.report["files"][CARD] == len(card.content.encode())
    assert f"| mean KL, nats | {done.report['figures']['mean_kl']:.6g} |" in card.text
    assert "Verdicts of the run" in card.text and str(run_folder.parent) not in card.content


def test_an_export_whose_card_cannot_be_written_says_so_and_is_there(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report_of())
    place = SimpleNamespace(folder=tmp_path, checkpoint_step=2, eval_loss=2.5)
    work: Any = SimpleNamespace(run=SimpleNamespace(place=place), staging=tmp_path / "out")
    noted = write._with_card(work, EXPORTED)
    assert "no card of the export: FileNotFoundError" in noted.notes[-1]
    work.staging.mkdir()
    assert write._with_card(work, EXPORTED).files == {CARD: (tmp_path / "out" / CARD).stat().st_size}
    card = (tmp_path / "out" / CARD).read_text()
    assert "checkpoint of step 2 of 100" in card and "| validation | 2.9134 | 2.5000 |" in card
