"""Reading a recipe file as plain data: raw scalars, lines of keys, and nothing that YAML could execute or hide."""

import pytest

from launcher.errors import RecipeError
from launcher.recipe.yaml_lines import inline, read_file, read_value


def test_scalars_keep_their_raw_text_and_null_is_none(own):
    own.write_text(
        "model:\n  revision: 0123456\ncompile: {mode: off}\ntrain:\n  lr: 1e-3\n  steps:\n  clip: ~\nrun: 'null'\n"
    )
    assert read_file(own)[0] == {
        "model": {"revision": "0123456"},
        "compile": {"mode": "off"},
        "train": {"lr": "1e-3", "steps": None, "clip": None},
        "run": "null",
    }


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.yaml.*No such file"):
        read_file(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="a recipe is a file"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("abc", "abc"),
        ("0123456", "0123456"),
        ("null", None),
        ("", None),
        ("'null'", "null"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("[{path: a.jsonl}]", [{"path": "a.jsonl"}]),
        ("C:\\data: all #1", "C:\\data: all #1"),
        ("@home", "@home"),
    ],
)
def test_a_value_of_the_command_line_is_raw_text_or_a_flow_collection(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize(
    "value",
    [None, [], ["a", "b"], [{"path": "a.jsonl", "format": "auto"}], "text", "a, b: c", "null", "[x", "", "\x1b[31m"],
)
def test_a_value_written_inline_reads_back(value):
    assert read_value(inline(value)) == value
    assert read_value(inline([value])) == [value]
    assert inline(value).isprintable()


def test_numbers_are_written_short_and_exact():
    assert [inline(value) for value in (2e-4, 1.0, 16, True, 1 / 3)] == ["0.0002", "1", "16", "true", repr(1 / 3)]
