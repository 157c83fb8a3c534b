"""Every field's type, range and default, and the words that switch a field off."""

import json
import math
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe import field_types
from launcher.recipe.data_section import DataSection
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.schema import CompileSection, LoraSection, Recipe, TrainSection


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**sections, "train": {"steps": 1, **sections.get("train", {})}})


def test_the_defaults_are_the_documented_ones() -> None:
    values = recipe().model_dump()
    assert values["model"] == {
        "name": "unsloth/Llama-3.2-1B-Instruct",
        "revision": None,
        "init": "pretrained",
        "dtype": "auto",
        "attention": "auto",
    }
    assert values["quant"] == {"type": "nf4", "double": True}
    assert values["lora"] == {
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    [source] = values["data"]["sources"]
    assert (source["path"], source["format"]) == (str(recipes_dir() / "tiny" / "train.jsonl"), "auto")
    assert values["data"]["validation"] == 0.05
    assert values["compile"]["regions"] == ["mlp", "rmsnorm", "attention", "loss"]
    assert (values["train"]["lr"], values["train"]["clip"], values["train"]["warmup"]) == (2e-4, 1.0, 0.05)
    assert values["run"] == {"output_dir": None, "trackers": [], "sample_tokens": 48}


def test_two_recipes_never_share_a_list() -> None:
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
        ("lora.alpha", [0.5], [0]),
        ("lora.dropout", [0], [1.0]),
        ("lora.targets", [["q_proj"]], [[], ["q_proj", "q_proj"]]),
        ("data.max_length", [16, 131072], [15, 131073]),
        ("data.sources", [[{"path": "a.jsonl", "format": "text"}]], [[], [{"format": "text"}]]),
        ("data.sources", [[{"path": "a.jsonl", "weight": 0.5}]], [[{"path": "a.jsonl", "weight": 0}]]),
        ("data.sources", [[{"path": "a.jsonl"}]], [[{"path": "a.jsonl", "format": "csv"}]]),
        (
            "data.validation",
            ["0.1", 0, "valid.jsonl", {"path": "a"}],
            [1.0, "1", "1.5", -0.1, ".inf", {"format": "text"}],
        ),
        ("compile.regions", [["mlp"], []], [["mpl"], ["mlp", "mlp"]]),
        ("memory.budget", [0, 1], [-0.1, 1.1]),
        ("memory.loss_chunk_mib", [1, 65536], [0, 65537]),
        ("train.epochs", [0.5], [0]),
        ("train.lr", [1, 1e-9], [1.5, 0]),
        ("train.clip", [None, 0.1], [0]),
        ("train.seed", [0, 2**32 - 1], [-1, 2**32]),
        ("run.trackers", [["tensorboard"]], [["wandb"], ["tensorboard", "tensorboard"]]),
        ("run.sample_tokens", [0, 1024], [-1, 1025]),
        ("run.output_dir", ["runs/x"], [""]),
        *((f"train.{name}", [1], [0]) for name in ("steps", "micro_batch", "accumulation", "log_every")),
        *((f"train.{name}", [0], [-1]) for name in ("eval_every", "warmup", "weight_decay")),
        *((key, [1], [0]) for key in ("data.wait_s", "proof.parity", "proof.bench")),
    ],
)
def test_a_value_inside_the_range_is_taken_and_one_outside_is_refused(
    key: str, accepted: list[Any], refused: list[Any]
) -> None:
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
NUMBERS = [(s, n) for s, n, kind in FIELDS if {int, float} & {kind, *get_args(kind)} or n in ("validation", "clip")]


@pytest.mark.parametrize(("section", "name", "choices"), CHOICES)
def test_a_choice_takes_its_words_and_no_other(section: str, name: str, choices: tuple[str, ...]) -> None:
    for word in choices:
        assert getattr(getattr(recipe(**{section: {name: word}}), section), name) == word
    others = ["planted", None, choices[0].upper()] + ([] if "off" in choices else [False])
    for other in others:
        with pytest.raises(ValidationError, match=f"{section}.{name}"):
            recipe(**{section: {name: other}})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "nan", ".inf"])
@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_no_number_may_be_nan_or_infinite(section: str, name: str, number: float | str) -> None:
    with pytest.raises(ValidationError, match=f"{section}.{name}"):
        recipe(**{section: {name: number}})


def test_the_tests_of_all_choices_and_all_numbers_see_them_all() -> None:
    assert (len(CHOICES), len(NUMBERS)) == (17, 22), (CHOICES, NUMBERS)


@pytest.mark.parametrize("word", [False, "off", "OFF", "no", "false"])
def test_a_field_that_can_be_off_takes_every_word_for_it(word: bool | str) -> None:
    section = CompileSection(mode=word, cuda_graphs=word)  # type: ignore[arg-type]
    assert (section.mode, section.cuda_graphs) == ("off", "off")
    assert TrainSection(steps=1, clip=word).clip is None  # type: ignore[arg-type]
    assert DataSection(validation=word).validation == 0.0


@pytest.mark.parametrize(
    ("value", "read"), [("0.1", 0.1), (0, 0.0), ("./v.jsonl", "./v.jsonl"), ("1.jsonl", "1.jsonl")]
)
def test_validation_is_a_fraction_where_it_reads_as_a_number_else_a_path(value: Any, read: float | str) -> None:
    validation = DataSection(validation=value).validation
    assert validation == read and type(validation) is type(read)


def test_a_missing_end_names_both_keys_beside_the_other_errors_of_its_section() -> None:
    with pytest.raises(ValidationError, match=r"train\.steps or train\.epochs") as caught:
        TrainSection(lr=2, micro_batch=0)
    assert {error["loc"][0] for error in caught.value.errors()} == {"lr", "micro_batch", "epochs"}
    assert TrainSection(epochs=1).steps is None
    assert TrainSection(steps=3, epochs=1).steps == 3


def test_a_section_is_frozen_and_takes_no_unknown_key() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LoraSection().r = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rank"):
        LoraSection(rank=4)  # type: ignore[call-arg]


def test_the_json_schema_describes_every_field_and_names_no_folder_of_this_machine() -> None:
    schema = Recipe.model_json_schema()
    for section, definition in schema["$defs"].items():
        for name, field in definition["properties"].items():
            assert field.get("description"), f"{section}.{name}"
    assert str(recipes_dir().parent) not in json.dumps(schema)


def test_the_shipped_recipes_lie_inside_the_package_or_beside_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout in ("recipes", "launcher/recipes"):
        root = tmp_path / layout.replace("/", "-")
        (root / layout).mkdir(parents=True)
        (root / layout / "tiny.yaml").touch()
        monkeypatch.setattr(field_types, "__file__", str(root / "launcher" / "recipe" / "field_types.py"))
        assert recipes_dir() == root / layout
    monkeypatch.setattr(field_types, "__file__", str(tmp_path / "nowhere" / "launcher" / "recipe" / "field_types.py"))
    with pytest.raises(RecipeError, match="install the package again"):
        recipes_dir()
