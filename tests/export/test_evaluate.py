"""mode=evaluate: the run's own eval loss again, any other data with the run's masks, and what is said of both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.export.conftest import Main, trained
from tests.support.planted import plant

CLAIM = "the loss is what the run measured"
CHAT = {"messages": [{"role": "user", "content": "Define a heron."}, {"role": "assistant", "content": "It is a bird."}]}


@pytest.fixture
def evaluate(main: Main, run_folder: Path) -> Main:
    return lambda *more, run=run_folder: main("mode=evaluate", f"run={run}", "report=report.json", *more)


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copied"))


def change(file: Path, *path: str, value: Any) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data={file}"


def test_the_loss_is_the_one_that_the_run_printed_and_the_bases_that_of_before_its_first_step(
    evaluate: Main, run_folder: Path
) -> None:
    done = evaluate("base=true")
    assert done.code == 0, done.err
    losses = json.loads((run_folder / "report.json").read_text())["loss"]
    assert done.report["trained"]["loss"] == pytest.approx(losses["eval_last"], abs=1e-5)
    assert done.report["without_adapter"]["loss"] == pytest.approx(losses["eval_first"], abs=1e-5)
    assert losses["eval_first"] - losses["eval_last"] > 0.1
    assert CLAIM in {verdict["claim"] for verdict in done.report["verdicts"]} and done.report["holds"]
    assert done.report["run_eval_loss"] == losses["eval_last"]
    assert done.report["rows"] == done.report["documents"] == 6 and done.report["loss_on"] == {"assistant": 6}
    assert f"{losses['eval_last']:.4f}" in done.out and "token accuracy" in done.out and "base alone" in done.out


def test_an_adapter_that_is_scaled_wrongly_gives_another_loss_and_it_is_said(evaluate: Main, copied: Path) -> None:
    change(copied / "adapter" / "adapter_config.json", "lora_alpha", value=64 * 1.02)
    done = evaluate(run=copied)
    assert done.code == 4 and done.broken == {CLAIM}
    assert "must give what its run measured" in done.err and "in the run" in done.err and "FAIL" in done.out
    # What it is on other data is not the run's to say.
    assert evaluate("max_rows=3", run=copied).code == 0


def test_a_checkpoint_is_compared_where_the_run_evaluated_at_its_step(evaluate: Main, run_folder: Path) -> None:
    claims = {}
    for step in (4, 8):
        done = evaluate(run=run_folder / "checkpoints" / f"step-{step}")
        assert done.code == 0, done.err
        claims[step] = {verdict["claim"] for verdict in done.report["verdicts"]}
    assert CLAIM in claims[8] and CLAIM not in claims[4]


def test_data_that_has_changed_or_lacks_validation_is_said_and_not_compared(evaluate: Main, copied: Path) -> None:
    report = copied / "report.json"
    change(report, "data", "tokens", value=7)
    done = evaluate(run=copied)
    assert done.code == 0 and "has changed since: tokens 7 then" in " ".join(done.out.split())
    change(report, "recipe", "data", "validation", value=0)
    trained = evaluate(run=copied)
    assert trained.code == 0 and "the run has no validation data: its training data" in " ".join(trained.out.split())
    assert (trained.report["documents"], trained.report["run_eval_loss"]) == (60, None)
    assert all(CLAIM not in str(found.report["verdicts"]) for found in (done, trained))


def test_every_format_is_read_and_its_loss_is_on_what_training_would_see(evaluate: Main, tmp_path: Path) -> None:
    chat = evaluate(write(tmp_path / "chat.jsonl", CHAT))
    assert chat.code == 0, chat.err
    alpaca = {"instruction": "Define a heron.", "output": "It is a bird."}
    same = evaluate(write(tmp_path / "alpaca.jsonl", alpaca))
    assert same.report["trained"]["loss"] == pytest.approx(chat.report["trained"]["loss"], abs=1e-6)
    assert (chat.report["loss_on"], same.report["loss_on"]) == ({"assistant": 1}, {"completion": 1})
    pair = evaluate(write(tmp_path / "pair.jsonl", {"prompt": "A heron is ", "completion": "a bird."}))
    text = evaluate(write(tmp_path / "text.jsonl", {"text": "A heron is a bird."}))
    assert (pair.report["loss_on"], text.report["loss_on"]) == ({"completion": 1}, {"all": 1})
    assert 0 < pair.report["supervised_tokens"] < text.report["supervised_tokens"] < text.report["tokens"]
    both = evaluate(f"data=[{{path: {tmp_path}/chat.jsonl}}, {tmp_path}/text.jsonl]")
    assert both.report["loss_on"] == {"assistant": 1, "all": 1}
    parts = [(part["trained"]["loss"], part["supervised_tokens"]) for part in (chat.report, text.report)]
    mean = sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)
    assert both.report["trained"]["loss"] == pytest.approx(mean, abs=1e-5)


def test_max_rows_leaves_rows_out_and_says_so(evaluate: Main, rows_file: Path) -> None:
    own, given = evaluate("max_rows=2"), evaluate(f"data={rows_file}", "max_rows=2")
    assert (own.report["rows"], given.report["rows"]) == (2, 2)
    assert "the first 2 of 6 documents" in own.out and "only the first 2 rows were read" in given.out
    assert "max_rows" not in evaluate("max_rows=6").out
    assert "max_rows" not in evaluate(f"data={rows_file}", f"max_rows={len(rows_file.read_text().splitlines())}").out


def test_samples_stand_beside_the_datas_own_answers(evaluate: Main, run_folder: Path, tmp_path: Path) -> None:
    own = evaluate("samples=1", "base=true")
    assert own.code == 0, own.err
    [answer] = own.report["answers"]
    sample = json.loads((run_folder / "report.json").read_text())["sample"]
    assert answer["expected"] == sample["expected"] and answer["trained"]["text"].startswith(sample["generated"])
    assert answer["prompt"] in sample["prompt"] and answer["base"]["text"] != answer["trained"]["text"]
    question = {"messages": CHAT["messages"][:1]}  # without an answer there is nothing to compare with
    given = evaluate(write(tmp_path / "mixed.jsonl", question, CHAT), "samples=2")
    assert given.code == 0 and [answer["expected"] for answer in given.report["answers"]] == ["It is a bird."]
    said = " ".join(given.out.split())
    assert "1 row dropped: nothing to learn" in said and "samples: 1 of 2 rows" in said and "It is a bird." in said


def test_a_prompt_that_is_too_long_to_be_answered_costs_its_answer_alone(evaluate: Main, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is a bird. " * 30}]}
    more = {"messages": [*chat["messages"], {"role": "user", "content": "w " * 600}, CHAT["messages"][1]]}
    done = evaluate(write(tmp_path / "chats.jsonl", CHAT, more), "samples=2")
    assert done.code == 0 and len(done.report["answers"]) == 1, done.err
    assert "samples: row 2: a prompt must leave room" in " ".join(done.out.split())


def test_a_prompt_that_the_template_refuses_costs_its_answer_alone(
    evaluate: Main, copied: Path, tmp_path: Path
) -> None:
    template = copied / "adapter" / "chat_template.jinja"
    refusal = "{% if add_generation_prompt %}{{ raise_exception('no prompts here') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    done = evaluate(write(tmp_path / "chats.jsonl", CHAT), "samples=1", run=copied)
    assert done.code == 0 and not done.report["answers"] and done.report["trained"]["loss"] > 0, done.err
    assert "samples: row 1: the chat template must take the conversation" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ("", 3, "0 usable rows"),
        ('{"text": \n', 3, "asked.jsonl:1"),
        ('{"question": "a"}\n', 3, "columns of a format"),
        (None, 3, "no such file"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(
    evaluate: Main, tmp_path: Path, content: str | None, code: int, says: str
) -> None:
    if content is not None:
        (tmp_path / "asked.jsonl").write_text(content)
    done = evaluate("data=./asked.jsonl")
    assert done.code == code and says in done.err and not done.report, done.err
    assert ("importing torch" in done.out) == (content is not None), "a wrong path is answered at once"


def test_an_unfinished_run_is_evaluated_on_given_data_and_told_why_not_on_its_own(
    evaluate: Main, copied: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "chat.jsonl", CHAT)
    finished = evaluate(data, run=copied)
    shutil.rmtree(copied / "adapter")
    (copied / "report.json").unlink()
    done = evaluate(data, run=copied)
    assert done.code == 0 and "step-8, is used" in done.out, done.err
    assert done.report["trained"] == finished.report["trained"]
    refused = evaluate(run=copied)
    assert refused.code == 2 and "a digest, which names no file" in refused.err and "give data=PATH" in refused.err


def test_the_best_checkpoints_adapter_is_compared_with_its_own_loss(
    evaluate: Main, small_arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, dict.fromkeys(range(4, 9), -1.0))  # training goes up the gradient: step 3 is the best
    best = ("train.keep_best=true", "train.eval_every=1", "train.schedule=constant", "train.warmup=0")
    run = trained(small_arguments, tmp_path / "best", *best)
    losses = json.loads((run / "report.json").read_text())["loss"]
    assert losses["eval_adapter"] < losses["eval_last"] - 0.1
    done = evaluate(run=run)
    assert done.code == 0 and CLAIM in {verdict["claim"] for verdict in done.report["verdicts"]}, done.err
    assert done.report["run_eval_loss"] == losses["eval_adapter"]
    change(
        run / "report.json", "loss", value={"eval_last": losses["eval_last"]}
    )  # of a version that has no eval_adapter
    assert evaluate(run=run).report["run_eval_loss"] is None
