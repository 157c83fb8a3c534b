"""The options of the modes that use a finished run: values, defaults, and all errors at once."""

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.run_options import EvaluateOptions, ExportOptions, GenerateOptions, read_options


def refused(*arguments: str, mode: str = "generate") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_options([f"mode={mode}", *arguments], mode)
    return str(caught.value).splitlines()


def test_values_are_read_as_their_options_say_and_texts_stay_as_they_are() -> None:
    prompt = "a: [b, {c} # 1e3"
    options = read_options(
        ["mode=generate", "run=r", f"prompt={prompt}", "temperature=0.7", "top_p=0.9", "max_tokens=5", "base=on"],
        "generate",
    )
    assert options == GenerateOptions(run="r", prompt=prompt, temperature=0.7, top_p=0.9, max_tokens=5, base=True)
    export = read_options(["mode=export", "run=12", "to=~/x", "dtype=fp16", "report=r.json"], "export")
    assert export == ExportOptions(run="12", to="~/x", dtype="float16")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=r", "prompt=a", "prompts=b"], "give one"),
        (["run=r", "top_p=0.5"], "needs sampling"),
        (["run=r", "seed=1"], "try temperature=0.7"),
        (["run=r", "temperature=-1"], "a number from 0 to 10; got '-1'"),
        (["run=r", "max_tokens=many"], "a whole number from 1"),
        (["run=r", "promt=a"], "did you mean prompt?"),
        (["run=r", "train.steps=3"], "mode=generate has no key train.steps"),
        (["run=r", "recipe=tiny"], "takes the recipe of its run"),
        (["run=r", "run=s"], "twice"),
        (["run=r", "report=a.json"], "mode=generate writes no report; got report=a.json; remove it"),
        (["run=r", "hello"], "every argument is key=value"),
        (["--run", "r"], "write run=..."),
        (["run="], "run must be"),
        ([], "run must be given; got nothing; try run=./runs/"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(arguments: list[str], says: str) -> None:
    assert says in "\n".join(refused(*arguments))


def test_all_errors_come_at_once() -> None:
    lines = refused("format=merge", "shard_mib=0", "on=orignal", mode="export")
    assert len(lines) == 5 and all("must be" in line for line in lines)
    assert [line.split()[0] for line in lines] == ["run", "to", "format", "on", "shard_mib"]
    assert "belongs to format=merged" in refused("run=r", "to=t", "format=adapter", "dtype=fp16", mode="export")[0]
    assert "belongs to format=gguf; got q8_0" in refused("run=r", "to=t", "quantization=q8_0", mode="export")[0]
    assert "belongs to format=merged; got" in refused("run=r", "to=t", "format=gguf", "dtype=fp16", mode="export")[0]


def test_data_is_given_as_the_sources_of_a_recipe_are(tmp_path: Path) -> None:
    def paths(data: str) -> list[str]:
        options = read_options(["mode=evaluate", "run=r", f"data={data}"], "evaluate")
        assert isinstance(options, EvaluateOptions) and options.data
        return [source.path for source in options.data]

    comma = tmp_path / "a, b.jsonl"
    comma.touch()
    assert paths("./a.jsonl") == ["./a.jsonl"] and paths("a.jsonl, owner/set") == ["a.jsonl", "owner/set"]
    assert paths(str(comma)) == [str(comma)]
    assert paths("{path: a.csv, format: alpaca}") == ["a.csv"] and paths("[a.csv, {path: b}]") == ["a.csv", "b"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data=[a"], "put the argument in single quotes"),
        (["data={path: a, format: csv}"], "data must be a list of"),
        (["data={path: a, weight: 2}"], "remove weight"),
        (["data="], "data must be"),
        (["max_rows=0"], "max_rows must be"),
        (["samples=-1"], "a whole number from 0 to 1000"),
        (["prompt=a"], "mode=evaluate has no key prompt"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_said(arguments: list[str], says: str) -> None:
    assert says in "\n".join(refused("run=r", *arguments, mode="evaluate"))
