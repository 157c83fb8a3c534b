"""recipe=new: a recipe that resolves and trains, whatever the format; every value with its reason."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from launcher import cli
from launcher.commands.new_recipe import SAMPLE_ROWS, own_recipe
from launcher.errors import DataError, LauncherError
from launcher.recipe.load import resolve
from launcher.recipe.schema import Recipe
from launcher.runtime.ranks import RankInfo
from launcher.runtime.signals import listening

New = Callable[..., tuple[str, Recipe]]
QUESTION, ANSWER = "Define the noun number {}.", "Number {} is a whole number, and it is one more than that before."
FORMATS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": f"{q} {a}"},
    "tokens": lambda q, a: {"input_ids": [ord(letter) for letter in q + a]},
}


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join((row["text"] if file.suffix == ".txt" else json.dumps(row)) + "\n" for row in rows))
    return file


def rows_of(format: str, number: int = 60) -> list[dict[str, Any]]:
    return [FORMATS[format](QUESTION.format(n), ANSWER.format(n)) for n in range(number)]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    """The text and the recipe that recipe=new writes for its words, in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def write(*words: str, to: str = "mine.yaml") -> tuple[str, Recipe]:
        words = (*words, f"to={to}")
        own_recipe(["recipe=new", *words], "new", RankInfo(0, 0, 1, 1), Console(file=io.StringIO(), width=120))
        return Path(to).read_text(), resolve([f"recipe={to}"]).recipe

    return write


@pytest.mark.parametrize(
    ("format", "suffix"),
    [*((format, ".jsonl") for format in FORMATS), ("alpaca", ".csv"), ("prompt_completion", ".csv"), ("text", ".txt")],
)
def test_a_recipe_of_every_format_resolves_trains_and_gives_each_value_its_reason(
    new: New, small_model: Path, tmp_path: Path, format: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / f"rows{suffix}", rows_of(format))
    text, recipe = new(f"data=./rows{suffix}", f"model={small_model}")
    values = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(values) >= 12 and all(" # " in line for line in values) and max(map(len, text.splitlines())) <= 200
    [source] = recipe.data.sources
    assert (source.path, source.format) == (str(tmp_path / f"rows{suffix}"), format)
    assert f"60 rows, recognised as {format}" in text and "the model's tokenizer" in text and "GB on: none" in text
    with listening():
        code = cli.main(
            ["recipe=mine.yaml", "train.steps=2", "compile.mode=off", "run.output_dir=out", "run.sample_tokens=0"]
        )
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["data"]["max_length"] == recipe.data.max_length


def test_columns_of_no_format_are_to_be_renamed_in_the_file_or_mapped_by_hand(new: New, tmp_path: Path) -> None:
    written(tmp_path / "rows.csv", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="Rename the columns in the file, or write the recipe by hand: recipe=copy"):
        new("data=rows.csv")


def lines_of(length: int, number: int) -> list[dict[str, Any]]:
    return [{"text": f"{n} " + "word " * length} for n in range(number)]


def test_the_length_holds_99_of_100_rows_and_the_share_that_is_longer_is_said(
    new: New, small_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "short.jsonl", lines_of(50, 200))
    text, recipe = new("data=short.jsonl", f"model={small_model}", to="short.yaml")
    assert recipe.data.max_length == 256 and "holds 99 % of the rows whole; none is longer" in text
    written(tmp_path / "long.jsonl", [*lines_of(50, 99), *lines_of(300, 99)])
    text, recipe = new("data=long.jsonl", f"model={small_model}", to="long.yaml")
    assert recipe.data.max_length == 512, "a power of two that the longest fit into"
    written(tmp_path / "longest.jsonl", [*lines_of(50, 75), *lines_of(3000, 25)])
    text, recipe = new("data=longest.jsonl", f"model={small_model}", to="longest.yaml")
    assert recipe.data.max_length == 512, "the model has no more positions"
    assert "does not hold 99 % of the rows whole; 25.0 % are longer" in text and recipe.data.too_long == "split"


def test_more_rows_mean_fewer_epochs_a_higher_rank_and_a_smaller_share_held_out(
    new: New, small_model: Path, tmp_path: Path
) -> None:
    recipes = []
    for number in (5, 300, 3_000, 25_000):
        written(tmp_path / f"{number}.jsonl", rows_of("text", number))
        recipes.append(new(f"data={number}.jsonl", f"model={small_model}", to=f"{number}.yaml"))
    text = recipes[-1][0]
    assert f"{SAMPLE_ROWS:,} rows drawn at random" in text and "25,000 rows" in text
    assert [recipe.train.epochs for _, recipe in recipes] == [3, 3, 2, 1]
    assert [(recipe.lora.r, recipe.lora.alpha) for _, recipe in recipes] == [(16, 32)] * 3 + [(32, 64)]
    assert [recipe.data.validation for _, recipe in recipes] == [0, 0.1, 0.05, 0.04]
    steps = [recipe.train.micro_batch * recipe.train.accumulation for _, recipe in recipes]
    assert steps[0] == 1 and steps[-1] * recipes[-1][1].data.max_length == 4096
    assert [recipe.train.eval_every > 0 for _, recipe in recipes] == [False, True, True, True]


def test_a_model_that_is_not_here_is_forecast_by_its_shipped_architecture_and_lengths_are_estimated(
    new: New, tmp_path: Path
) -> None:
    written(tmp_path / "rows.jsonl", rows_of("messages"))
    text, recipe = new("data=rows.jsonl")
    assert recipe.model.name == "unsloth/Llama-3.2-1B-Instruct" and "estimated at 3 characters a token" in text
    text, recipe = new("data=rows.jsonl", "model=unsloth/Meta-Llama-3.1-8B-Instruct", to="8b.yaml")
    assert "from 8 GB on: none" in text and recipe.train.lr == 1e-4
    text, recipe = new("data=rows.jsonl", "model=some/other", to="other.yaml")
    assert "no forecast" in text and recipe.train.lr == 2e-4


def test_paths_are_relative_to_the_file_where_they_lie_below_it_and_else_absolute(
    new: New, small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep" / "rows.jsonl", rows_of("text"))
    shutil.copytree(small_model, tmp_path / "model")
    text, _ = new("data=deep/rows.jsonl", "model=./model", to="deep/a.yaml")
    assert "{path: ./rows.jsonl," in text and f"name: {tmp_path}/model #" in text
    text, _ = new("data=deep", "model=./model", to="b.yaml")
    assert "{path: ./deep," in text and "name: ./model #" in text


def test_a_line_break_in_a_name_ends_no_comment(new: New, small_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small_model, tmp_path / "m\nrun: {output_dir: x}")
    written(tmp_path / "rows.jsonl", rows_of("text"))
    text, recipe = new("data=rows.jsonl", f"model={model}")
    assert recipe.model.name == str(model) and recipe.run.output_dir is None and "\nrun:" not in text


def test_a_folders_own_validation_files_validate(new: New, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    written(tmp_path / "d" / "train.jsonl", rows_of("text"))
    written(tmp_path / "d" / "validation.jsonl", rows_of("text", 10))
    text, recipe = new("data=d", f"model={small_model}")
    assert recipe.data.validation == str(tmp_path / "d") and "60 rows" in text and "validation.jsonl" in text


def test_faulty_rows_are_counted_and_skipped_in_the_recipe(new: New, small_model: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", rows_of("messages"))
    file.write_text('{"x": 1}\n' + file.read_text() + '{"messages": 3}\n{"messages": []}\n')
    text, recipe = new("data=rows.jsonl", f"model={small_model}")
    assert recipe.data.bad_rows == "skip" and "cannot be used: 2 wrong_type, 1 empty" in text and "on 60 rows" in text


def test_a_tokenizer_without_a_chat_template_gets_one_that_fits(new: New, small_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    written(tmp_path / "rows.jsonl", rows_of("messages"))
    _, recipe = new("data=rows.jsonl", "model=./model")
    assert recipe.data.template == "chatml"


@pytest.mark.parametrize(
    ("words", "content", "code", "says"),
    [
        ("data=./gone.jsonl", None, 3, "no such file or folder"),
        ("data=./rows.jsonl", "", 3, "all of it is empty"),
        ("data=./rows.jsonl", '{"messages": []}\n', 3, "needs rows; all of it is empty"),
        ("data=./rows.jsonl", '{"question": "a", "answer": "b"}\n', 3, 'the columns answer, question'),
        ("data=./rows.jsonl", '{"text": "a", "messages": []}\n', 3, "format: messages or format: text"),
        ("data=./rows.pdf", "x", 3, "a .pdf file"),
        ("data=./rows.jsonl to=taken.yaml", "x", 2, "exists; choose another name"),
        ("data=./rows.jsonl to=no/m.yaml", "x", 2, "make it first"),
        ("data=./rows.jsonl to=m.txt", "x", 2, "must end in .yaml"),
        ("data=./rows.jsonl model=./gone", '{"text": "a"}\n', 2, "there is no folder 'gone'"),
        ("data=./rows.jsonl format=csv", "x", 2, "format must be one of auto, messages"),
        ("date=./rows.jsonl", "x", 2, "did you mean data?"),
        ("", None, 2, "data must be given; got nothing; try data=./my.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_remedy_and_nothing_is_written(
    words: str, content: str | None, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.yaml").touch()
    for name in ("rows.jsonl", "rows.pdf"):
        if content is not None:
            (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    given = words.split() + ([] if "to=" in words else ["to=m.yaml"])
    with pytest.raises(LauncherError) as caught:
        own_recipe(["recipe=new", *given], "new", RankInfo(0, 0, 1, 1), Console(file=io.StringIO()))
    assert says in str(caught.value) and caught.value.code == code and len(str(caught.value).splitlines()) <= 5
    assert sorted(tmp_path.iterdir()) == before
