"""Resolving a command line: which recipe, which layer wins, and where each value comes from."""

from pathlib import Path

import pytest

from launcher.recipe.field_types import recipe_names
from launcher.recipe.load import resolve

# --- layers and provenance


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(own):
    resolved = resolve([f"recipe={own}", "train.lr=5e-4", "lora.r=8"])
    assert (resolved.recipe.train.lr, resolved.recipe.train.steps, resolved.recipe.lora.r) == (5e-4, 7, 8)
    assert resolved.recipe.lora.alpha == 32
    assert resolved.origins["train.lr"] == "command line"
    assert resolved.origins["train.steps"] == "file"
    assert resolved.origins["train.clip"] == "default"
    assert len(resolved.origins) == sum(map(len, resolved.recipe.model_dump().values()))
    assert (resolved.name, resolved.path, resolved.mode) == ("own", own, "train")


def test_a_list_is_replaced_and_never_merged(own):
    recipe = resolve([f"recipe={own}", "data.sources=[{path: a, format: text}]", "lora.targets=[v_proj,o_proj]"]).recipe
    sources = [source.model_dump(exclude_none=True) for source in recipe.data.sources]
    assert sources == [{"path": "a", "format": "text"}]
    assert recipe.lora.targets == ["v_proj", "o_proj"]


def test_a_whole_section_may_be_given_and_merges(own):
    resolved = resolve([f"recipe={own}", "train={lr: 1e-5, clip: off}"])
    train = resolved.recipe.train
    assert (train.lr, train.clip, train.steps) == (1e-5, None, 7)
    assert resolved.origins["train.clip"] == "command line"


def test_null_on_the_command_line_takes_back_what_the_file_set(own):
    train = resolve([f"recipe={own}", "train.steps=null", "train.epochs=2"]).recipe.train
    assert (train.steps, train.epochs) == (None, 2)


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("train: {steps: 7}", "train.epochs=3", (None, 3, None, "auto")),
        ("train: {epochs: 3}", "train.steps=7", (7, None, None, "auto")),
        ("train: {steps: 7}", "train={epochs: 2}", (None, 2, None, "auto")),
        ("train: {steps: 7}", "train.epochs=null", (7, None, None, "auto")),
        ("train: {steps: 7}\nmemory: {activations: full}", "memory.budget=0.5", (7, None, 0.5, "auto")),
        ("train: {steps: 7}\nmemory: {budget: 0.5}", "memory.activations=none", (7, None, None, "none")),
        ("train: {steps: 7}\nmemory: {budget: 0.5, activations: auto}", "memory.budget=0.2", (7, None, 0.2, "auto")),
    ],
)
def test_a_key_on_the_command_line_displaces_the_files_other_key_for_the_same_thing(own, file, line, expected):
    own.write_text(file)
    recipe = resolve([f"recipe={own}", line]).recipe
    assert (recipe.train.steps, recipe.train.epochs, recipe.memory.budget, recipe.memory.activations) == expected


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("./a.jsonl", ["{cwd}/a.jsonl"]),
        ("a.jsonl, ./b.csv", ["a.jsonl", "{cwd}/b.csv"]),
        ("[./a.jsonl, {path: owner/name, split: test}]", ["{cwd}/a.jsonl", "owner/name"]),
        ("{path: ./a.jsonl}", ["{cwd}/a.jsonl"]),
        ('["a,b.jsonl"]', ["a,b.jsonl"]),
    ],
)
def test_sources_may_be_paths_or_one_entry_on_both_layers(own, monkeypatch, text, paths):
    monkeypatch.chdir(own.parent)
    expected = [path.format(cwd=own.parent) for path in paths]
    own.write_text(f"train: {{steps: 1}}\ndata:\n  sources: {text}\n")
    for arguments in ([f"recipe={own}"], ["recipe=tiny", f"data.sources={text}"]):
        assert [source.path for source in resolve(arguments).recipe.data.sources] == expected


def test_a_list_may_be_words_with_commas_and_a_dtype_may_have_its_short_name(own):
    own.write_text("train: {steps: 1}\nlora: {targets: 'q_proj, v_proj'}\nmodel: {dtype: bf16}\n")
    recipe = resolve([f"recipe={own}", "compile.regions=mlp,loss", "run.trackers=tensorboard"]).recipe
    assert (recipe.lora.targets, recipe.compile.regions) == (["q_proj", "v_proj"], ["mlp", "loss"])
    assert (recipe.run.trackers, recipe.model.dtype) == (["tensorboard"], "bfloat16")
    for short, name in (("fp32", "float32"), ("fp16", "float16")):
        assert resolve(["recipe=tiny", f"model.dtype={short}"]).recipe.model.dtype == name


@pytest.mark.parametrize("text", ["train:\n  epochs: 1\nlora:\n", "# only a comment\n"])
def test_a_section_or_file_left_empty_sets_nothing(own, text):
    own.write_text(text)
    assert resolve([f"recipe={own}", "model=", "train.steps=1"]).recipe.lora.r == 16


@pytest.mark.parametrize("word", ["off", "OFF", "no", "false"])
def test_a_field_that_can_be_off_takes_every_word_for_it_on_both_layers(own, word):
    own.write_text(f"train: {{steps: 1, clip: {word}}}\ncompile:\n  mode: {word}\n")
    recipe = resolve([f"recipe={own}", f"compile.cuda_graphs={word}", f"data.validation={word}"]).recipe
    assert (recipe.compile.mode, recipe.compile.cuda_graphs) == ("off", "off")
    assert (recipe.train.clip, recipe.data.validation) == (None, 0.0)


def test_a_relative_path_starts_from_the_folder_of_the_layer_that_sets_it(own, monkeypatch):
    own.write_text(
        "train: {steps: 1}\nmodel: {name: ../base}\ndata:\n  sources: [{path: ./a}, {path: b}, {path: ~/c}]\n"
    )
    root = own.parents[1]
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", "/home/me")
    recipe = resolve(["recipe=folder/own.yaml", "data.validation=./v.jsonl", "run.output_dir=../out"]).recipe
    assert recipe.model.name == str(root / "base")
    assert [source.path for source in recipe.data.sources] == [str(own.parent / "a"), "b", "/home/me/c"]
    assert recipe.data.validation == str(root / "v.jsonl")
    assert recipe.run.output_dir == str(root.parent / "out")


def test_mode_report_and_blocks_stand_beside_the_sections(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    resolved = resolve([f"recipe={own}", "mode=show", "report=out/report.json"])
    assert (resolved.mode, resolved.report) == ("show", own.parent / "out" / "report.json")
    assert resolve([f"recipe={own}"]).report is None
    assert resolve([f"recipe={own}", "mode=preview", "blocks=0"]).blocks == 0
    assert resolve([f"recipe={own}", "mode=preview"]).blocks == 2


# --- which recipe


def test_without_a_recipe_the_message_lists_them(refusal):
    for argv in ([], ["train.lr=1e-3"], ["recipe="]):
        message = refusal(*argv)
        assert "recipe=" in message and all(name in message for name in recipe_names())


@pytest.mark.parametrize("name", ["../tiny", "a/b", "/etc/passwd", "..\\tiny", "tiny/"])
def test_a_recipe_name_with_a_slash_is_refused(refusal, name):
    message = refusal(f"recipe={name}")
    assert ".yaml" in message and repr(name) in message


def test_a_missing_file_is_named_and_a_shipped_recipe_of_that_name_suggested(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "gone.yaml" in refusal("recipe=sub/gone.yaml")
    assert "did you mean recipe=tiny" in refusal("recipe=tiny.yaml")


def test_a_recipe_of_ones_own_is_suggested_where_a_name_or_path_nearly_names_it(refusal, own, monkeypatch):
    monkeypatch.chdir(own.parents[1])
    for argument in ("recipe=folder/own", "folder/own", "recipe=folder/onw.yaml"):
        assert "did you mean recipe=folder/own.yaml?" in refusal(argument)
    own.rename(own.with_suffix(".yml"))
    assert "must end in .yaml; got 'folder/own.yml'; rename it" in refusal("recipe=folder/own.yml")


@pytest.mark.parametrize(
    ("file", "line", "key", "remedy"),
    [
        ("data: {sources: beside.jsonl}", "", "data.sources[0].path", "./beside.jsonl"),
        ("data: {sources: ./here.jsonl}", "", "data.sources[0].path", "here.jsonl"),
        ("data: {validation: beside.jsonl}", "", "data.validation", "./beside.jsonl"),
        ("model: {name: base}", "", "model.name", "./base"),
        ("", "data.sources=here.jsonl,./beside.jsonl", "data.sources[1].path", "folder/beside.jsonl"),
        ("", "data.validation={path: beside.jsonl}", "data.validation", "folder/beside.jsonl"),
    ],
)
def test_a_path_that_lies_in_the_other_folder_is_refused_with_what_finds_it(
    refusal, own, monkeypatch, file, line, key, remedy
):
    root = own.parents[1]
    monkeypatch.chdir(root)
    (own.parent / "beside.jsonl").touch()
    (own.parent / "base").mkdir()
    (root / "here.jsonl").touch()
    own.write_text(f"train: {{steps: 1}}\n{file}\n")
    arguments = ["recipe=folder/own.yaml", *filter(None, [line])]
    assert f"{key} is looked for in" in refusal(*arguments)
    assert refusal(*arguments).endswith(f"did you mean {remedy}?")
    at = own.parent if remedy.startswith("./") else root
    assert (at / remedy).exists()
    (own.parent / "beside.jsonl").rename(root / "beside.jsonl")  # where the bare name and the command line look
    (own.parent / "base").rename(root / "base")
    (root / "here.jsonl").rename(own.parent / "here.jsonl")
    if "here" not in line:
        resolve(arguments)


@pytest.mark.parametrize("text", ["./a,b.jsonl", "a,b.jsonl"])
def test_a_path_with_a_comma_that_exists_is_one_source(own, monkeypatch, text):
    monkeypatch.chdir(own.parent)
    line = [f"recipe={own}", f"data.sources={text}"]
    assert [Path(source.path).name for source in resolve(line).recipe.data.sources] == ["a", "b.jsonl"]
    (own.parent / "a,b.jsonl").touch()
    assert [Path(source.path).name for source in resolve(line).recipe.data.sources] == ["a,b.jsonl"]
    own.write_text(f"train: {{steps: 1}}\ndata: {{sources: '{text}'}}\n")
    monkeypatch.chdir(own.parent.parent if text.startswith("./") else own.parent)
    assert [Path(source.path).name for source in resolve(line[:1]).recipe.data.sources] == ["a,b.jsonl"]
