"""Merging weight by weight: on the very base that was trained on, with the adapter's own scale, in bounded memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, GenerationConfig

from launcher.errors import RecipeError
from launcher.export.load_run import OpenedRun
from launcher.export.merge import merged_weight, plan_merge, read_updates, write_merged
from launcher.export.place import RunPlace
from launcher.model.load import load_base, load_config
from launcher.model.lora import nf4_of
from launcher.ops.nf4 import plain_merged_weight
from launcher.recipe.schema import Recipe
from tests.conftest import small_config
from tests.support.resident import resident_kib


def opened(source: Path, *, dtype: torch.dtype = torch.float32, double: bool = True) -> OpenedRun:
    """A run on the checkpoint at `source`, without an adapter."""
    recipe = Recipe.model_validate({"model": {"name": str(source)}, "quant": {"double": double}, "train": {"steps": 1}})
    place = RunPlace(source, source, recipe, str(dtype)[6:], finished=True)
    config = load_config(str(source), recipe.model)
    return OpenedRun(place, str(source), config, None, torch.device("cpu"), dtype, GenerationConfig(eos_token_id=[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
def test_the_base_that_is_merged_into_is_bit_for_bit_the_one_that_is_trained_on(
    small_model: Path, dtype: torch.dtype, double: bool
) -> None:
    run = opened(small_model, dtype=dtype, double=double)
    plan = plan_merge(run, on="dequantised", dtype=torch.float32)
    base = load_base(
        run.source, run.config, quant=run.place.recipe.quant, dtype=dtype, device=run.device, revision=None
    ).model
    linears = {f"{name}.weight": m for name, m in base.named_modules() if isinstance(m, Linear4bit)}
    assert linears.keys() == plan.linears and len(linears) == 14
    for name, linear in linears.items():
        trained = plain_merged_weight(nf4_of(linear), None, None, 1.0, torch.Size(plan.shapes[name]))
        assert torch.equal(merged_weight(plan, name, None), trained)
    embedding = merged_weight(plan, "model.embed_tokens.weight", None)
    assert torch.equal(embedding, base.get_input_embeddings().weight)


def test_no_more_than_one_file_is_in_memory(tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10, "head_dim": 192}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(**size), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    del model
    plan = plan_merge(opened(tmp_path / "base"), on="dequantised", dtype=torch.bfloat16)
    assert plan.nbytes > 190 * 2**20
    (tmp_path / "out").mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    before = resident_kib("VmRSS")
    done: list[int] = []
    files = write_merged(plan, {}, tmp_path / "out", shard_bytes=24 * 2**20, progress=done.append)
    assert len(files) >= 9 and done == [*range(1, len(plan.shapes) + 1)]
    assert resident_kib("VmHWM") - before < 120 * 1024


def with_settings(run_folder: Path, folder: Path, **settings: Any) -> Path:
    adapter = Path(shutil.copytree(run_folder / "adapter", folder / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    return adapter


def test_the_scale_is_alpha_by_r_and_by_its_root_for_rslora(run_folder: Path, tmp_path: Path) -> None:
    plain = read_updates(run_folder / "adapter")
    assert len(plain) == 14 and {update.scale for update in plain.values()} == {2.0}
    root = read_updates(with_settings(run_folder, tmp_path, use_rslora=True))
    assert {update.scale for update in root.values()} == {64 / 32**0.5}


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_an_adapter_that_is_more_than_b_a_is_refused(
    run_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=f"has {next(iter(settings))}="):
        read_updates(with_settings(run_folder, tmp_path, **settings))


def test_an_adapter_without_the_rows_that_its_config_names_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="must hold the rows of its trained tokens; .* none of embed_tokens"):
        read_updates(with_settings(run_folder, tmp_path, trainable_token_indices=[3]))


def test_an_adapter_of_another_base_is_refused(run_folder: Path, small_model: Path, tmp_path: Path) -> None:
    plan = plan_merge(opened(small_model), on="dequantised", dtype=torch.float32)
    updates = {
        name.replace("layers.1", "layers.7"): update for name, update in read_updates(run_folder / "adapter").items()
    }
    with pytest.raises(RecipeError, match="layers.7"):
        write_merged(plan, updates, tmp_path, shard_bytes=2**30, progress=lambda _: None)
