"""A sample ends where the trained model's answers do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from launcher.export.load_run import open_run
from launcher.export.place import RunPlace
from launcher.records.run import RunRecord
from launcher.runtime.ranks import RankInfo
from launcher.train.inputs import prepare_inputs
from tests.conftest import WIDTH, request_for
from tests.support.runs import trained

TURN_END = "<|system|>"  # any control token but eos


@pytest.fixture
def model_with(small_model: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """The small model with this generation_config.json and a template that ends turns with TURN_END."""

    def make(generation: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(small_model, tmp_path / "model"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|system|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


@pytest.mark.parametrize(
    ("generation", "stops"), [({"eos_token_id": [70, 71]}, {70, 71}), ({"eos_token_id": 70}, {70}), ({}, set())]
)
def test_the_stop_tokens_of_a_sample_are_those_of_the_answers_of_its_run(
    make: Callable[..., Any], tmp_path: Path, model_with: Any, generation: dict[str, Any], stops: set[int]
) -> None:
    recipe = make(model={"name": str(model_with(generation))})
    prepared = prepare_inputs(request_for(recipe))
    tokenizer = prepared.tokenizer
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    place = RunPlace(tmp_path, tmp_path / "adapter", recipe, "float32", finished=True)
    of_answers = open_run(place, recipe.model.name, RankInfo(0, 0, 1, 1)).stop_ids
    expected = stops | {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)}
    assert set(prepared.stop_ids) == set(of_answers) == expected


@pytest.mark.usefixtures("clean_dynamo")
def test_samples_of_a_run_end_at_any_stop_token_of_the_model(make: Callable[..., Any], model_with: Any) -> None:
    folder = model_with({"eos_token_id": list(range(WIDTH["vocab_size"]))})
    events = trained(make(model={"name": str(folder)}, run={"eval_samples": 1}, train={"steps": 2, "eval_every": 1}))
    record = next(event for event in events if isinstance(event, RunRecord))
    assert record.sample is not None and record.sample.generated == ""
    lines = (Path(record.start.run_dir) / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 and {json.loads(line)["generated"] for line in lines} == {""}
