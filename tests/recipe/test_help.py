"""mode=show, recipe=list, mode=schema and --help: what they print, on a terminal and into a pipe."""

import io
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from launcher.recipe.field_types import recipes_dir
from launcher.recipe.help import print_request, schema_json
from launcher.recipe.load import recipe_names, resolve


def printed(*argv: str, terminal: bool = False) -> str:
    stream = io.StringIO()
    assert print_request(argv, console=Console(file=stream, force_terminal=terminal, width=120))
    return stream.getvalue()


def test_a_command_line_that_asks_for_a_run_prints_nothing() -> None:
    stream = io.StringIO()
    for argv in (
        ["recipe=tiny"],
        ["recipe=tiny", "mode=train"],
        ["recipe=tiny", "mode=preview"],
        ["lerning_rate=1"],
        [],
    ):
        assert not print_request(argv, console=Console(file=stream))
    assert stream.getvalue() == ""


def test_show_gives_each_key_its_value_and_origin() -> None:
    lines = printed("recipe=llama1b", "mode=show", "train.steps=100", "lora.r=32").splitlines()
    row = {line.split()[0]: line for line in lines if line.strip()}
    assert row["train.steps"].split()[1] == "100" and "command line" in row["train.steps"]
    assert row["lora.r"].split()[1] == "32" and "command line" in row["lora.r"]
    assert row["train.micro_batch"].split()[1] == "2" and "file" in row["train.micro_batch"]
    assert row["compile.mode"].split()[1] == "strict" and "default" in row["compile.mode"]
    assert set(resolve(["recipe=llama1b"]).origins) <= set(row)


def test_the_list_has_a_line_for_each_recipe_with_its_model() -> None:
    lines = printed("recipe=list").splitlines()
    for name in recipe_names():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert resolve([f"recipe={name}"]).recipe.model.name.rsplit("/", 1)[-1] in line
        assert len(line.split()) >= 5, "a description stands between name and model"


def test_off_a_terminal_text_is_plain_and_a_row_is_one_line() -> None:
    for argv in (["recipe=list"], ["recipe=tiny", "mode=show"], ["mode=schema"], ["--help"]):
        text = printed(*argv)
        assert text.isascii() and "\x1b" not in text
    wide = printed("recipe=tiny", "mode=show", f"model.name={'x' * 300}")
    assert "x" * 300 in wide


def test_a_value_cannot_send_control_codes(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text('train: {steps: 1}\nmodel: {name: "a\\e[31mb"}\n')
    assert resolve([f"recipe={own}"]).recipe.model.name == "a\x1b[31mb"
    assert "\x1b" not in printed(f"recipe={own}", "mode=show")


def test_on_a_terminal_the_tables_are_drawn() -> None:
    assert "│" in printed("recipe=list", terminal=True)
    assert "│" in printed("recipe=tiny", "mode=show", terminal=True)


def test_a_value_with_square_brackets_survives_the_terminal() -> None:
    text = printed("recipe=tiny", "mode=show", "model.name=x[red]base[/red]", terminal=True)
    assert "x[red]base[/red]" in text


def test_the_shipped_json_schema_is_the_one_of_the_code() -> None:
    assert (recipes_dir() / "schema.json").read_text() == schema_json()
    assert json.loads(printed("mode=schema")) == json.loads(schema_json())


def test_help_names_every_key_and_its_meaning() -> None:
    for word in ("--help", "-h", "help"):
        text = printed(word)
        assert "train.lr" in text and "a number > 0 and <= 1" in text and "recipe=list" in text
        assert "mode=preview" in text and "blocks=N" in text


def test_showing_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from launcher.recipe.help import print_request\n"
        "from rich.console import Console\n"
        "for argv in (['recipe=list'], ['recipe=tiny', 'mode=show'], ['mode=schema'], ['--help']):\n"
        "    assert print_request(argv, console=Console())\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=recipes_dir().parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
