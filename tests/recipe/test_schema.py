"""Every field's type, range and default; the words that YAML turns into booleans."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.recipe import field_types as section_module
from launcher.recipe.data_section import DataSection
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.schema import CompileSection, LoraSection, Recipe, TrainSection


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"train": {"steps": 1}} | sections)


def test_the_defaults_are_the_documented_ones() -> None:
    found = recipe().model_dump()
    assert found["model"] == {
        "name": "unsloth/Llama-3.2-1B-Instruct",
        "revision": None,
        "init": "pretrained",
        "dtype": "auto",
        "attention": "auto",
    }
    assert found["quant"] == {"type": "nf4", "double": True}
    assert found["lora"]["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (found["lora"]["r"], found["lora"]["alpha"], found["lora"]["dropout"]) == (16, 32.0, 0.0)
    [source] = found["data"]["sources"]
    assert {key: value for key, value in source.items() if value is not None} == {
        "path": str(recipes_dir() / "tiny" / "train.jsonl"),
        "format": "auto",
    }
    assert found["data"]["validation"] == 0.05
    assert found["compile"]["regions"] == ["mlp", "rmsnorm", "attention", "loss"]
    assert (found["train"]["lr"], found["train"]["clip"], found["train"]["warmup"]) == (2e-4, 1.0, 0.05)
    assert found["run"] == {"output_dir": None, "trackers": [], "sample_tokens": 48}


def test_two_recipes_never_share_a_list() -> None:
    first, second = recipe(), recipe()
    first.lora.targets.append("planted")
    assert "planted" not in second.lora.targets


@pytest.mark.parametrize(
    ("section", "key", "good", "bad"),
    [
        ("model", "init", "random", "empty"),
        ("model", "dtype", "float16", "int8"),
        ("model", "attention", "varlen", "flash"),
        ("model", "name", "a/b", ""),
        ("model", "revision", "0123456", 123456),
        ("quant", "type", "none", "int8"),
        ("quant", "double", "false", "perhaps"),
        ("lora", "r", 1024, 1025),
        ("lora", "r", 1, 0),
        ("lora", "alpha", 0.5, 0),
        ("lora", "dropout", 0, 1.0),
        ("lora", "targets", ["q_proj"], []),
        ("lora", "targets", ["q_proj"], ["q_proj", "q_proj"]),
        ("data", "max_length", 16, 15),
        ("data", "max_length", 131072, 131073),
        ("data", "loss_on", "assistant", "user"),
        ("data", "bad_rows", "skip", "keep"),
        ("data", "too_long", "split", "cut"),
        ("data", "sources", [{"path": "a.jsonl", "format": "text"}], []),
        ("data", "sources", [{"path": "a.jsonl"}], [{"path": "a.jsonl", "format": "csv"}]),
        ("data", "sources", [{"path": "a.jsonl"}], [{"format": "text"}]),
        ("data", "sources", [{"path": "a.jsonl"}], [{"path": "a.jsonl", "weight": 0}]),
        ("data", "template", "chatml", "vicuna"),
        ("data", "batching", "bucketed", "sorted"),
        ("data", "wait_s", 1, 0),
        ("compile", "mode", "warn", "loose"),
        ("compile", "scope", "regions", "graph"),
        ("compile", "regions", ["mlp"], ["mpl"]),
        ("compile", "regions", [], ["mlp", "mlp"]),
        ("compile", "backend", "aot_eager", "eager"),
        ("memory", "loss_chunk_mib", 1, 0),
        ("memory", "loss_chunk_mib", 65536, 65537),
        ("train", "steps", 1, 0),
        ("train", "epochs", 0.5, 0),
        ("train", "micro_batch", 1, -1),
        ("train", "accumulation", 1, 0),
        ("train", "lr", 1, 1.5),
        ("train", "lr", 1e-9, 0),
        ("train", "schedule", "linear", "step"),
        ("train", "warmup", 0, -0.1),
        ("train", "optimizer", "paged_adamw_8bit", "sgd"),
        ("train", "weight_decay", 0.1, -0.1),
        ("train", "clip", None, 0),
        ("train", "seed", 2**32 - 1, 2**32),
        ("train", "eval_every", 0, -1),
        ("train", "log_every", 1, 0),
        ("run", "trackers", ["tensorboard"], ["wandb"]),
        ("run", "sample_tokens", 1024, 1025),
        ("run", "output_dir", "runs/x", ""),
        ("proof", "parity", 1, 0),
        ("proof", "bench", 1, 0),
        ("proof", "bench_rows", "random", "full"),
        ("proof", "bench_naive", "off", "perhaps"),
    ],
)
def test_a_value_inside_the_range_is_taken_and_one_outside_is_refused(
    section: str, key: str, good: Any, bad: Any
) -> None:
    recipe(**{section: {"steps": 1, key: good} if section == "train" else {key: good}})
    with pytest.raises(ValidationError, match=key):
        recipe(**{section: {"steps": 1, key: bad} if section == "train" else {key: bad}})


NUMBERS = [
    (section, key)
    for section, field in Recipe.model_fields.items()
    for key, leaf in field.annotation.model_fields.items()  # type: ignore[union-attr]
    if {int, float} & {leaf.annotation, *getattr(leaf.annotation, "__args__", ())} or key in ("validation", "clip")
]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "nan", ".inf"])
@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_no_number_may_be_nan_or_infinite(section: str, key: str, number: float | str) -> None:
    with pytest.raises(ValidationError, match=f"{section}.{key}"):
        recipe(**{section: {"steps": 1, key: number} if section == "train" else {key: number}})


def test_the_nan_test_covers_every_number_of_the_schema() -> None:
    assert len(NUMBERS) == 22, NUMBERS


@pytest.mark.parametrize("word", [False, "off", "OFF", "no", "false"])
def test_a_choice_takes_the_booleans_that_yaml_makes_of_off(word: bool | str) -> None:
    assert CompileSection(mode=word).mode == "off"  # type: ignore[arg-type]
    assert TrainSection(steps=1, clip=word).clip is None  # type: ignore[arg-type]
    assert DataSection(validation=word).validation == 0.0


def test_a_boolean_is_no_choice_where_off_is_none() -> None:
    with pytest.raises(ValidationError, match="dtype"):
        recipe(model={"dtype": False})


@pytest.mark.parametrize(
    ("given", "kept"), [("0.1", 0.1), (0, 0.0), ("./valid.jsonl", "./valid.jsonl"), ("1.jsonl", "1.jsonl")]
)
def test_validation_is_a_fraction_or_a_path(given: Any, kept: float | str) -> None:
    found = DataSection(validation=given).validation
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize("fraction", [1.0, "1", "1.5", -0.1])
def test_a_validation_fraction_out_of_range_is_not_taken_for_a_path(fraction: float | str) -> None:
    with pytest.raises(ValidationError, match="validation"):
        DataSection(validation=fraction)


def test_a_run_has_an_end_and_the_error_names_both_keys() -> None:
    with pytest.raises(ValidationError, match=r"train\.steps.*train\.epochs"):
        Recipe.model_validate({"train": {"lr": 1e-3}})
    assert TrainSection(epochs=1).steps is None
    assert TrainSection(steps=3, epochs=1).steps == 3


def test_a_missing_end_is_reported_beside_the_other_errors_of_its_section() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainSection(lr=2, micro_batch=0)
    assert {error["loc"][0] for error in caught.value.errors()} == {"lr", "micro_batch", "epochs"}


def test_a_section_is_frozen_and_takes_no_unknown_key() -> None:
    lora = LoraSection()
    with pytest.raises(ValidationError, match="frozen"):
        lora.r = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rank"):
        LoraSection(rank=4)  # type: ignore[call-arg]


def test_the_json_schema_describes_every_field_and_names_no_folder_of_this_machine() -> None:
    described = Recipe.model_json_schema()
    for name, definition in described["$defs"].items():
        for key, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert str(recipes_dir().parent) not in json.dumps(described)


def test_recipes_are_found_beside_the_package_or_inside_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("recipes", "launcher/recipes"):
        root = tmp_path / layout.replace("/", "-")
        (root / layout).mkdir(parents=True)
        (root / layout / "tiny.yaml").touch()
        (root / "launcher" / "recipe").mkdir(parents=True)
        monkeypatch.setattr(section_module, "__file__", str(root / "launcher" / "recipe" / "field_types.py"))
        assert recipes_dir() == root / layout
    nowhere = tmp_path / "nowhere" / "launcher" / "recipe" / "field_types.py"
    monkeypatch.setattr(section_module, "__file__", str(nowhere))
    with pytest.raises(FileNotFoundError, match="recipes"):
        recipes_dir()
