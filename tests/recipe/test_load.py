"""Resolving a command line: which recipe, which layer wins, where each value came from, and how fast."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.recipe.field_types import recipes_dir
from launcher.recipe.load import recipe_names, resolve

Refusal = Callable[..., str]  # the fixture: arguments in, message out

# --- layers and provenance


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(own: Path) -> None:
    found = resolve([f"recipe={own}", "train.lr=5e-4", "lora.r=8"])
    assert (found.recipe.train.lr, found.recipe.train.steps, found.recipe.lora.r) == (5e-4, 7, 8)
    assert found.recipe.lora.alpha == 32
    assert found.origins["train.lr"] == "command line"
    assert found.origins["train.steps"] == "file"
    assert found.origins["train.clip"] == "default"
    assert (found.name, found.path, found.mode) == ("own", own, "train")


def test_every_key_of_the_recipe_has_an_origin(own: Path) -> None:
    dump = resolve([f"recipe={own}"]).recipe.model_dump()
    leaves = {f"{section}.{key}" for section, keys in dump.items() for key in keys}
    assert set(resolve([f"recipe={own}"]).origins) == leaves


def test_a_list_is_replaced_and_never_merged(own: Path) -> None:
    found = resolve([f"recipe={own}", "data.sources=[{path: a.jsonl, format: text}]", "lora.targets=[v_proj,o_proj]"])
    sources = [source.model_dump(exclude_none=True) for source in found.recipe.data.sources]
    assert sources == [{"path": "a.jsonl", "format": "text"}]
    assert found.recipe.lora.targets == ["v_proj", "o_proj"]


def test_a_whole_section_may_be_given_and_merges(own: Path) -> None:
    found = resolve([f"recipe={own}", "train={lr: 1e-5, clip: off}"])
    assert (found.recipe.train.lr, found.recipe.train.clip, found.recipe.train.steps) == (1e-5, None, 7)
    assert found.origins["train.clip"] == "command line"


def test_null_on_the_command_line_takes_back_what_the_file_set(own: Path) -> None:
    found = resolve([f"recipe={own}", "train.steps=null", "train.epochs=2"])
    assert (found.recipe.train.steps, found.recipe.train.epochs) == (None, 2)


def test_strings_keep_their_raw_text_on_both_layers(own: Path) -> None:
    own.write_text("train: {steps: 1}\nmodel:\n  name: 007\n")
    found = resolve([f"recipe={own}", "model.revision=0123456"])
    assert (found.recipe.model.name, found.recipe.model.revision) == ("007", "0123456")


@pytest.mark.parametrize("word", ["off", "no", "false"])
def test_a_bare_off_reaches_its_choice_on_both_layers(own: Path, word: str) -> None:
    assert resolve([f"recipe={own}", f"compile.mode={word}"]).recipe.compile.mode == "off"
    own.write_text(f"train: {{steps: 1, clip: {word}}}\ncompile:\n  mode: {word}\n")
    assert resolve([f"recipe={own}"]).recipe.compile.mode == "off"
    assert resolve([f"recipe={own}"]).recipe.train.clip is None


def test_a_relative_path_belongs_to_the_layer_that_names_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_text(
        "train: {steps: 1}\nmodel: {name: ../base}\ndata:\n  sources: [{path: ./a.jsonl}, {path: b.jsonl}]\n"
    )
    monkeypatch.chdir(own.parents[1])
    found = resolve(["recipe=folder/own.yaml", "data.validation=./v.jsonl", "run.output_dir=../out"])
    assert found.recipe.model.name == str(own.parents[1] / "base")
    assert [source.path for source in found.recipe.data.sources] == [str(own.parent / "a.jsonl"), "b.jsonl"]
    assert found.recipe.data.validation == str(own.parents[1] / "v.jsonl")
    assert found.recipe.run.output_dir == str(own.parents[2] / "out")


def test_mode_and_report_stand_beside_the_sections(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    found = resolve([f"recipe={own}", "mode=show", "report=out/report.json"])
    assert (found.mode, found.report) == ("show", own.parent / "out" / "report.json")
    assert resolve([f"recipe={own}"]).report is None


def test_the_number_of_blocks_stands_beside_the_sections_of_a_preview(own: Path) -> None:
    assert resolve([f"recipe={own}", "mode=preview", "blocks=7"]).blocks == 7
    assert resolve([f"recipe={own}", "mode=preview", "blocks=0"]).blocks == 0
    found = resolve([f"recipe={own}", "mode=preview"])
    assert (found.mode, found.blocks) == ("preview", 2)


# --- which recipe


def test_without_a_recipe_the_message_lists_them(refusal: Refusal) -> None:
    for argv in ([], ["train.lr=1e-3"], ["recipe="]):
        message = refusal(*argv)
        assert "recipe=" in message and all(name in message for name in recipe_names())


def test_an_unknown_recipe_lists_the_recipes_and_the_nearest(refusal: Refusal) -> None:
    message = refusal("recipe=llama1")
    assert "'llama1'" in message and "did you mean recipe=llama1b" in message
    assert all(name in message for name in recipe_names())


@pytest.mark.parametrize("name", ["../tiny", "a/b", "/etc/passwd", "..\\tiny", "tiny/"])
def test_a_recipe_name_with_a_slash_is_refused(refusal: Refusal, name: str) -> None:
    assert ".yaml" in refusal(f"recipe={name}") and repr(name) in refusal(f"recipe={name}")


def test_a_missing_own_recipe_names_the_path_and_a_shipped_name_is_suggested(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "gone.yaml" in refusal("recipe=sub/gone.yaml")
    assert "did you mean recipe=tiny" in refusal("recipe=tiny.yaml")


def test_a_broken_file_names_file_and_line(refusal: Refusal, own: Path) -> None:
    own.write_text("train:\n  lr: [1\n")
    assert f"{own}:3" in refusal(f"recipe={own}")


# --- speed


def test_a_bad_key_costs_no_heavy_import_and_less_than_a_second() -> None:
    code = (
        "import resource, sys\n"
        "from launcher.recipe.load import resolve\n"
        "from launcher.errors import RecipeError\n"
        "try: resolve(['recipe=tiny', 'lerning_rate=1'])\n"
        "except RecipeError: pass\n"
        "else: sys.exit('not refused')\n"
        "resolve(['recipe=tiny'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'accelerate'} & set(sys.modules)\n"
        "if heavy: sys.exit(str(heavy))\n"
        # Of the processor, since the clock of a busy machine measures its neighbours.
        "print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=recipes_dir().parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1.0
