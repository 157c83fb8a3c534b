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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  lr: [1\n", "own.yaml:3"),
        ("train:\n\tlr: 1\n", "own.yaml:2"),
        ("a: 1\nb: !!python/object/apply:os.system ['touch planted']\n", "own.yaml:2"),
        ("a: !own 1\n", "own.yaml:1"),
        ("a: !!binary aGk=\n", "own.yaml:1"),
        ("a: &x [1]\nb: *x\n", "own.yaml:1: a value that an alias"),
        ("a: &x\n  - *x\n", "own.yaml"),
        ("a: 1\nb: 2\na: 3\n", "own.yaml:3: the key 'a' is given twice"),
        ("? [1, 2]\n: 3\n", "own.yaml:1"),
        ("# c\n- 1\n- 2\n", "own.yaml:2"),
        ("just text\n", "own.yaml:1"),
        ("a: 1\n---\nb: 2\n", "own.yaml:2"),
        (b"a: \xff\n", "UTF-8"),
        ("a: \x07\n", "own.yaml"),
        ("a: " + "[" * 2000, "own.yaml"),
        ("a: " + "[" * 100 + "]" * 100, "own.yaml:1: nested too deeply"),
    ],
)
def test_what_is_not_a_plain_mapping_is_refused_with_file_and_line(own, monkeypatch, text, expected):
    monkeypatch.chdir(own.parent)
    own.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        read_file(own)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (own.parent / "planted").exists()


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
