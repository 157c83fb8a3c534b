"""recipe=copy: the user's own file does what the shipped recipe does, and none is ever replaced."""

import io

import pytest
from rich.console import Console

from launcher.commands.new_recipe import own_recipe
from launcher.errors import RecipeError
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.load import resolve
from launcher.runtime.ranks import RankInfo

ALONE = RankInfo(0, 0, 1, 1)


def copied(*words: str, info: RankInfo = ALONE) -> str:
    console = Console(file=io.StringIO(), width=200)
    own_recipe(["recipe=copy", *words], "copy", info, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_in_any_folder_resolves_to_what_the_shipped_recipe_does(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    said = copied(f"from={name}", "to=deep/mine.yaml")
    copy, shipped = resolve(["recipe=deep/mine.yaml"]), resolve([f"recipe={name}"])
    assert (copy.recipe, copy.origins) == (shipped.recipe, shipped.origins) and copy.path != shipped.path
    assert "recipe=deep/mine.yaml mode=preview" in said


def test_a_copy_keeps_the_comments_and_says_where_it_comes_from(tmp_path):
    copied("from=tiny", f"to={tmp_path}/mine.yaml")
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    shipped = (recipes_dir() / "tiny.yaml").read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={recipes_dir() / 'schema.json'}"
    assert lines[1].startswith("# A copy of the recipe tiny")
    assert [line.partition("#")[2] for line in lines[2:]] == [line.partition("#")[2] for line in shipped[1:]]


def test_every_relative_path_of_an_own_file_is_made_right_however_it_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "own.yaml").write_text(
        "model: {name: './base'} # ./stays\ndata:\n  sources: [\"./a b.jsonl\", ../c.jsonl]\n"
        "  validation: './v: 1.jsonl'\ntrain: {steps: 1}\n"
    )
    copied(f"from={tmp_path}/there/own.yaml", f"to={tmp_path}/mine.yaml")
    copy, own = (resolve([f"recipe={tmp_path / file}"]) for file in ("mine.yaml", "there/own.yaml"))
    assert copy.recipe == own.recipe
    paths = [own.recipe.model.name, own.recipe.data.validation, *(source.path for source in own.recipe.data.sources)]
    there = tmp_path / "there"
    assert paths == [f"{there}/base", f"{there}/v: 1.jsonl", f"{there}/a b.jsonl", f"{tmp_path}/c.jsonl"]
    assert "# ./stays" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("from=lama1b to=./m.yaml", "did you mean from=llama1b?"),
        ("from=gone.yaml to=./m.yaml", "'gone.yaml' does not exist"),
        ("from=tiny to=./m", "to must end in .yaml; got './m'; try to=./m.yaml"),
        ("from=tiny to=./taken.yaml", "'./taken.yaml' exists; choose another name"),
        ("from=tiny to=./no/m.yaml", "make it first"),
        ("to=./m.yaml", "from must be given; got nothing; try from=llama1b"),
        ("from=tiny", "to must be given; got nothing; try to=./mine.yaml"),
        ("fro=tiny to=./m.yaml", "did you mean from?"),
        ("from=tiny to=./m.yaml train.lr=1", "recipe=copy has no key train.lr"),
        ("from=tiny to=./m.yaml mode=check", "got mode=check; remove it"),
        ("from=tiny to=./m.yaml report=r.json", "got report=r.json; remove it"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy_and_nothing_is_written(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="(?s).*") as caught:
        copied(*words.split())
    assert says in str(caught.value) and len(str(caught.value).splitlines()) <= 5
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("taken.yaml", "mine")]


def test_of_several_processes_one_writes(tmp_path):
    assert copied("from=tiny", f"to={tmp_path}/m.yaml", info=RankInfo(1, 1, 2, 2)) == ""
    assert list(tmp_path.iterdir()) == []
    assert "wrote" in copied("from=tiny", f"to={tmp_path}/m.yaml", info=RankInfo(0, 0, 2, 2))
