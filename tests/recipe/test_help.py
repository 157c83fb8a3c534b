"""mode=show, recipe=list, mode=schema and --help: what they print, on a terminal and into a pipe."""

import io
import re
from importlib.metadata import version

import pytest
from rich.console import Console

from launcher import __version__
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.help import print_request
from launcher.recipe.load import resolve
from tests.conftest import ROOT


def printed(*argv: str, terminal: bool = False) -> str:
    stream = io.StringIO()
    assert print_request(argv, console=Console(file=stream, force_terminal=terminal, width=120))
    return stream.getvalue()


@pytest.mark.parametrize("argv", [["recipe=tiny"], ["recipe=tiny", "mode=preview"], ["lerning_rate=1"], []])
def test_a_command_line_that_asks_for_a_run_prints_nothing(argv):
    stream = io.StringIO()
    assert not print_request(argv, console=Console(file=stream))
    assert stream.getvalue() == ""


def test_show_gives_each_key_its_value_and_origin():
    lines = printed("recipe=llama1b", "mode=show", "train.steps=100").splitlines()
    row = {line.split()[0]: line for line in lines if line.strip()}
    for key, value, origin in (
        ("train.steps", "100", "command line"),
        ("train.micro_batch", "2", "file"),
        ("compile.mode", "strict", "default"),
    ):
        assert row[key].split()[1] == value and origin in row[key]
    assert set(resolve(["recipe=llama1b"]).origins) <= set(row)


def test_the_list_has_a_line_for_each_recipe_with_its_description_and_model():
    lines = printed("recipe=list").splitlines()
    for name in recipe_names():
        [line] = [line for line in lines if line.split()[0] == name]
        comment = (recipes_dir() / f"{name}.yaml").read_text().split("schema.json\n# ")[1].split("\n\n")[0]
        assert (
            comment.replace("\n# ", " ") in line
            and comment.endswith(".")
            and resolve([f"recipe={name}"]).recipe.model.name.rsplit("/", 1)[-1] in line
        )


@pytest.mark.parametrize(
    "argv", [["recipe=list"], ["recipe=tiny", "mode=show"], ["mode=schema"], ["mode=keys"], ["--help"]]
)
def test_off_a_terminal_the_text_is_plain(argv):
    text = printed(*argv)
    assert text.isascii() and "\x1b" not in text and "│" not in text


def test_off_a_terminal_a_row_is_one_line_and_on_one_the_tables_are_drawn():
    assert "x" * 300 in printed("recipe=tiny", "mode=show", f"model.name={'x' * 300}")
    assert "│" in printed("recipe=list", terminal=True)
    assert "│" in printed("recipe=tiny", "mode=show", terminal=True)


def test_a_value_can_send_neither_control_codes_nor_markup(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text('train: {steps: 1}\nmodel: {name: "a\\e[31mb"}\n')
    assert resolve([f"recipe={own}"]).recipe.model.name == "a\x1b[31mb"
    assert "\x1b" not in printed(f"recipe={own}", "mode=show")
    assert "x[red]base[/red]" in printed("recipe=tiny", "mode=show", "model.name=x[red]base[/red]", terminal=True)


@pytest.mark.parametrize(("mode", "file"), [("schema", "recipes/schema.json"), ("keys", "docs/keys.md")])
def test_what_is_written_from_the_schema_is_current(mode, file):
    assert (ROOT / file).read_text() == printed(f"mode={mode}")


def test_the_table_of_keys_has_a_row_for_each_key_with_its_default():
    rows = [line.split(" | ")[:2] for line in printed("mode=keys").splitlines() if line.startswith("| `")]
    defaults = {key.strip("| `"): default.strip("`") for key, default in rows}
    assert set(resolve(["recipe=tiny"]).origins) | {"data.sources[].path"} <= set(defaults)
    assert (defaults["train.lr"], defaults["lora.r"], defaults["train.steps"]) == ("0.0002", "16", "null")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_names_every_key_and_its_meaning(word):
    text = printed(word)
    assert "a number > 0 and <= 1" in " ".join(text.split()) and "Peak learning rate" in text
    assert all(key in text for key in resolve(["recipe=tiny"]).origins)
    assert all(form in text for form in ("recipe=list", "mode=preview", "blocks=2", "train.lr=0.0002"))


@pytest.mark.parametrize("terminal", [False, True])
def test_help_fits_80_columns_and_groups_the_keys_by_section(terminal):
    lines = printed("--help", terminal=terminal).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split(":")[0] for line in lines if re.match(r"[a-z.\[\]]+: ", line)]
    assert heads[1:] == ["model", "quant", "lora", "data", "data.sources[]", *heads[6:]]
    at = lines.index(next(line for line in lines if line.startswith("train: ")))
    assert lines[at + 1].strip().startswith("train.steps=null")


def test_the_version_names_this_program_and_what_it_runs_on():
    versions = dict(line.split() for line in printed("--version").splitlines())
    assert versions["qlora-launcher"] == __version__ and versions["torch"] == version("torch")
