"""What each kind of field takes and refuses."""

import json
import math
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe import field_types
from launcher.recipe.data_section import DataSection
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.schema import Recipe


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**sections, "train": {"steps": 1, **sections.get("train", {})}})


def test_two_recipes_never_share_a_list():
    first, second = recipe(), recipe()
    first.lora.targets.append("planted")
    assert "planted" not in second.lora.targets


@pytest.mark.parametrize(
    ("key", "accepted", "refused"),
    [
        ("model.name", ["a/b"], [""]),
        ("model.revision", ["0123456", None], [123456, ""]),
        ("quant.double", ["false", "off"], ["perhaps"]),
        ("lora.r", [1, 1024], [0, 1025]),
        (
            "lora.init",
            ["default", "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_0", "pissa_niter_16"],
            ["planted", None, "PISSA", False, "pissa_niter_", "pissa_niter_100", "pissa_niter_x"],
        ),
        ("lora.targets", [["q_proj"]], [[], ["q_proj", "q_proj"]]),
        (
            "data.sources",
            [[{"path": "a", "format": "text"}]],
            [[], [{"format": "text"}], [{"path": "a", "format": "csv"}]],
        ),
        ("data.validation", [{"path": "a"}], [1.0, "1", "1.5", -0.1, ".inf", {"format": "text"}]),
        ("compile.regions", [["mlp"], []], [["mpl"], ["mlp", "mlp"]]),
        ("train.clip", [None, 0.1], [0]),
        ("run.trackers", [["tensorboard", "wandb", "mlflow", "trackio"]], [["comet"], ["tensorboard", "tensorboard"]]),
        ("run.output_dir", ["runs/x"], [""]),
    ],
)
def test_a_value_that_fits_is_taken_and_any_other_is_refused(key, accepted, refused):
    """Ranges and defaults are those of the shipped JSON schema (test_help.py)."""
    section, name = key.split(".")
    for value in accepted:
        recipe(**{section: {name: value}})
    for value in refused:
        with pytest.raises(ValidationError, match=key):
            recipe(**{section: {name: value}})


FIELDS = [
    (section, name, field.annotation)
    for section, model in Recipe.model_fields.items()
    for name, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
]
CHOICES = [(section, name, get_args(kind)) for section, name, kind in FIELDS if get_origin(kind) is Literal]
OPTIONAL = ("validation", "clip", "patience", "spike_patience")
NUMBERS = [(s, n) for s, n, kind in FIELDS if {int, float} & {kind, *get_args(kind)} or n in OPTIONAL]


@pytest.mark.parametrize(("section", "name", "choices"), CHOICES)
def test_a_choice_takes_its_words_and_no_other(section, name, choices):
    for word in choices:
        needed = {"schedule": "constant"} if word == "schedule_free_adamw" else {}
        assert getattr(getattr(recipe(**{section: {**needed, name: word}}), section), name) == word
    others = ["planted", None, choices[0].upper()] + ([] if "off" in choices else [False])
    for other in others:
        with pytest.raises(ValidationError, match=f"{section}.{name}"):
            recipe(**{section: {name: other}})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "nan", ".inf"])
@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_no_number_may_be_nan_or_infinite(section, name, number):
    with pytest.raises(ValidationError, match=f"{section}.{name}"):
        recipe(**{section: {name: number}})


def test_the_tests_of_all_choices_and_all_numbers_see_them_all():
    assert (len(CHOICES), len(NUMBERS)) == (21, 29), (CHOICES, NUMBERS)


@pytest.mark.parametrize(
    ("value", "read"), [("0.1", 0.1), (0, 0.0), ("./v.jsonl", "./v.jsonl"), ("1.jsonl", "1.jsonl")]
)
def test_validation_is_a_fraction_where_it_reads_as_a_number_else_a_path(value, read):
    validation = DataSection(validation=value).validation
    assert validation == read and type(validation) is type(read)


def test_a_section_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        recipe().lora.r = 4


def test_the_json_schema_describes_every_field_and_names_no_folder_of_this_machine():
    schema = Recipe.model_json_schema()
    for section, definition in schema["$defs"].items():
        for name, field in definition["properties"].items():
            assert field.get("description"), f"{section}.{name}"
    assert str(recipes_dir().parent) not in json.dumps(schema)


def test_an_installation_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(field_types, "__file__", str(tmp_path / "launcher" / "recipe" / "field_types.py"))
    with pytest.raises(RecipeError, match="install the package again"):
        recipes_dir()
