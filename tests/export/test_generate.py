"""mode=generate: answers of the trained adapter, by prompt, by file and in a chat."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.read.rows import TokenIds
from launcher.errors import DataError
from launcher.export.generate import Answerer
from launcher.export.prompts import Prompt, prompt_of_row
from launcher.records.answers import Answered
from tests.export.conftest import Main

QUESTION = 'Define the noun "heron", a kind of wading bird.'


@pytest.fixture
def generate(main: Main, run_folder: Path) -> Main:
    return lambda *more, **options: main("mode=generate", f"run={run_folder}", "max_tokens=8", *more, **options)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_answer_to_the_runs_own_sample_prompt_is_what_training_generated(
    main: Main, run_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Training generates without a cache, by the packed model; here it is stock generate with one."""
    sample = json.loads((run_folder / "report.json").read_text())["sample"]
    [row] = [row for row in rows(rows_file) if row["messages"][-1]["content"] == sample["expected"]]
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    done = main("mode=generate", f"run={run_folder}", "prompts=asked.jsonl", "max_tokens=4")
    assert done.code == 0, done.err
    [answer] = rows(tmp_path / "asked.answers.jsonl")
    assert answer["trained"]["text"] == sample["generated"] != ""
    assert (answer["prompt"], answer["expected"]) == (row["messages"][:-1], sample["expected"])
    assert "tokens/s" in done.out and sample["expected"] in done.out


def test_a_prompt_is_answered_and_with_base_the_base_answers_beside_it(generate: Main, tmp_path: Path) -> None:
    alone, beside = generate(f"prompt={QUESTION}"), generate(f"prompt={QUESTION}", "base=true")
    assert (alone.code, beside.code) == (0, 0), alone.err + beside.err
    answer = alone.out.splitlines()[-1].strip()
    assert re.search(r"8 tokens, [\d,]+ tokens/s; cut by max_tokens", alone.err)
    said = {
        line.split()[0]: line.split(maxsplit=1)[1].strip() for line in beside.out.splitlines() if len(line.split()) > 1
    }
    assert said["trained"].split()[0] == answer.split()[0]
    assert said["base"] != said["trained"]
    assert list(tmp_path.iterdir()) == []


def test_sampling_repeats_with_its_seed_and_differs_with_another(generate: Main) -> None:
    def sampled(*more: str) -> str:
        done = generate(f"prompt={QUESTION}", "temperature=2", *more)
        assert done.code == 0, done.err
        return done.out.splitlines()[-1]

    assert sampled("seed=3") == sampled("seed=3")
    assert len({sampled(f"seed={seed}") for seed in range(3)}) > 1
    assert sampled("top_p=1e-6") == generate(f"prompt={QUESTION}").out.splitlines()[-1]


def test_any_chat_format_is_read_and_asked_without_its_last_answer(generate: Main, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "a bird"}
    asked = {"role": "user", "content": QUESTION}
    (tmp_path / "messages.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in ([asked], [asked, said], [asked, said, asked]))
    )
    alpaca = {"instruction": "Define it.", "input": "heron", "output": "a bird", "system": "Be short."}
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca]))
    assert generate("prompts=messages.jsonl").code == generate("prompts=alpaca.json").code == 0
    answers = rows(tmp_path / "messages.answers.jsonl")
    assert [answer["prompt"] for answer in answers] == [[asked], [asked], [asked, said, asked]]
    assert [answer["expected"] for answer in answers] == [None, "a bird", None]
    assert answers[0]["trained"]["text"] == answers[1]["trained"]["text"]
    [answer] = rows(tmp_path / "alpaca.answers.jsonl")
    assert [message["role"] for message in answer["prompt"]] == ["system", "user"]


def test_a_chat_keeps_the_whole_conversation(generate: Main) -> None:
    """The answer to a second line depends on the first exchange."""
    alone = generate(typed="And a crane?\n")
    both = generate(typed=f"{QUESTION}\n\nAnd a crane?\n")
    assert (alone.code, both.code) == (0, 0), both.err
    assert both.err.count("tokens/s") == 2 and alone.err.count("tokens/s") == 1
    assert both.out.splitlines()[-1] != alone.out.splitlines()[-1]


def test_the_base_of_a_chat_answers_beside_it(generate: Main) -> None:
    done = generate("base=true", typed=f"{QUESTION}\n")
    assert done.code == 0 and "trained: " in done.out and "base: " in done.out


def test_an_unfinished_run_answers_from_its_newest_checkpoint_and_is_not_exported(
    main: Main, run_folder: Path, tmp_path: Path
) -> None:
    """A checkpoint has no tokenizer: it is the base's, with the recipe's template."""
    unfinished = Path(shutil.copytree(run_folder, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "adapter")
    (unfinished / "report.json").unlink()
    asked = (f"prompt={QUESTION}", "max_tokens=8")
    done, finished = (main("mode=generate", f"run={run}", *asked) for run in (unfinished, run_folder))
    assert done.code == 0 and "step-8, is used" in done.err
    assert done.out.splitlines()[-1] == finished.out.splitlines()[-1]
    refused = main("mode=export", f"run={unfinished}", "to=out")
    assert refused.code == 2 and "the report.json of a finished run" in refused.err
    assert "data=" not in refused.err  # mode=export has no such option
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


@pytest.mark.parametrize("mode", ["generate", "evaluate", "export"])
@pytest.mark.parametrize(
    ("name", "kept", "says"),
    [
        ("adapter_config.json", 9, "is damaged: .*\nRestore it .*step-N"),
        ("adapter_model.safetensors", 7, "is damaged: .*\nRestore it .*step-N"),
        ("adapter_model.safetensors", -1, "is damaged: .*\nRestore it .*step-N"),
        ("tokenizer.json", None, "is missing.\nRestore it from a copy, or train again"),
        ("tokenizer_config.json", 9, "is damaged: .*\nRestore it from a copy, or train again"),
        ("tokenizer.json", 9, "is damaged: .*\nRestore it from a copy, or train again"),
    ],
)
def test_a_file_of_the_adapter_that_is_missing_or_cut_off_is_named(
    main: Main, run_folder: Path, tmp_path: Path, mode: str, name: str, kept: int | None, says: str
) -> None:
    damaged = Path(shutil.copytree(run_folder, tmp_path / "damaged"))
    file = damaged / "adapter" / name
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    more = {"generate": f"prompt={QUESTION}", "evaluate": "max_rows=1", "export": "to=out"}[mode]
    refused = main(f"mode={mode}", f"run={damaged}", more)
    assert refused.code == 4 and re.search(rf"{name} {says}", refused.err), refused.err


def test_a_bare_prompt_is_asked_as_the_command_line_asks_it(generate: Main, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": QUESTION}]
    (tmp_path / "bare.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n" for row in ({"prompt": QUESTION, "id": 1}, {"prompt": asked}, {"messages": asked})
        )
    )
    (tmp_path / "bare.csv").write_text(f"prompt\n{json.dumps(QUESTION).replace(chr(92) + chr(34), chr(34) * 2)}\n")
    for name in ("bare.jsonl", "bare.csv"):
        done = generate(f"prompts={name}")
        assert done.code == 0, done.err
        answers = rows(tmp_path / f"{name[:4]}.answers.jsonl")
        assert all((answer["prompt"], answer["expected"]) == (asked, None) for answer in answers)
        assert len(answers) == (3 if name == "bare.jsonl" else 1)
        (tmp_path / "bare.answers.jsonl").unlink()
    assert len({answer["trained"]["text"] for answer in answers}) == 1


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 2, "prompts must be a file"),
        ('{"text": "no chat"}\n', 3, "a prompt is a chat"),
        ('{"text": \n', 3, "asked.jsonl:1"),
        ('{"prompt": "a", "text": "no chat"}\n', 3, "a prompt is a chat"),
        ('{"prompt": 3}\n', 3, "asked.jsonl:1"),
        ('{"question": "a"}\n', 3, 'Give rows as {"prompt": "..."} or'),
        ('{"prompt": [3]}\n', 3, "a message is a"),
        ('{"prompt": [{"role": 3}]}\n', 3, "Correct the row, or take it out of the file."),
        ("", 3, "must hold a row"),
        (json.dumps({"messages": [{"role": "user", "content": "word " * 600}]}), 2, "leave room for an answer"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(
    generate: Main, tmp_path: Path, content: str | None, code: int, says: str
) -> None:
    if content is not None:
        (tmp_path / "asked.jsonl").write_text(content)
    done = generate("prompts=asked.jsonl")
    assert done.code == code and says in done.err, done.err
    assert ("importing torch" in done.out) == ("leave room" in says), "only the tokenizer knows a prompt's length"
    if "Correct the row" in says:
        assert "data.bad_rows" not in done.err and '"messages"' not in done.err
    assert not (tmp_path / "asked.answers.jsonl").exists()


def questions(tmp_path: Path, *contents: str) -> list[list[dict[str, str]]]:
    chats = [[{"role": "user", "content": content}] for content in contents]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return chats


def test_a_prompt_that_cannot_be_answered_costs_its_answer_alone(generate: Main, tmp_path: Path) -> None:
    chats = questions(tmp_path, "word " * 600, QUESTION)
    done = generate("prompts=asked.jsonl")
    assert done.code == 0, done.err
    refused, answered = rows(tmp_path / "asked.answers.jsonl")
    assert "must leave room for an answer" in refused["error"] and answered["trained"]["text"]
    assert [refused["prompt"], answered["prompt"]] == chats
    assert "1 answers are in" in done.out and "1 prompts have none, the first: a prompt must leave room" in done.out


def test_answers_are_not_overwritten(generate: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions(tmp_path, QUESTION)
    (tmp_path / "asked.answers.jsonl").write_text("{}\n")
    monkeypatch.setattr("launcher.commands.generate.located", lambda _: pytest.fail("too late"))
    done = generate("prompts=asked.jsonl")
    assert done.code == 2 and "must not be overwritten" in done.err and "1 answers" not in done.err


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt, 130), (MemoryError("std::bad_alloc"), 6)])
def test_what_ends_the_answers_early_says_what_is_left(
    generate: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any, code: int
) -> None:
    answered = Answerer.answered

    def ended(self: Answerer, prompt: Prompt) -> Answered:
        if prompt.content[0]["content"] != QUESTION:  # type: ignore[index]
            raise end
        return answered(self, prompt)

    questions(tmp_path, QUESTION, "And a crane?")
    monkeypatch.setattr(Answerer, "answered", ended)
    done = generate("prompts=asked.jsonl")
    assert done.code == code, done.err
    assert f"1 answers are in {tmp_path / 'asked.answers.jsonl'}: move or remove it" in done.err
    assert "nothing of it is left" not in done.err and len(rows(tmp_path / "asked.answers.jsonl")) == 1


def test_an_interrupt_before_the_first_answer_leaves_nothing(
    generate: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    questions(tmp_path, QUESTION)
    monkeypatch.setattr(Answerer, "answered", interrupted)
    done = generate("prompts=asked.jsonl")
    assert done.code == 130 and "nothing of it is left" in done.err
    assert not (tmp_path / "asked.answers.jsonl").exists()


def test_token_ids_are_no_prompt() -> None:
    with pytest.raises(DataError, match="f:1: a prompt is a chat.*\nFound: token ids"):
        prompt_of_row(TokenIds(np.array([5], np.int32), None, "f:1"))
