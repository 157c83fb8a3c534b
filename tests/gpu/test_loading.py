"""A base that the GPU quantised is compared with its files as one that the CPU quantised is."""

import pytest
import torch

from launcher.model.load import load_base, load_config
from launcher.model.weight_files import read_headers
from launcher.model.weight_values import compare_with_files
from launcher.recipe.schema import ModelSection, QuantSection

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", [QuantSection(), QuantSection(double=False), QuantSection(type="none")])
def test_a_base_on_the_gpu_is_found_whole_and_a_mixed_up_one_is_not(small_model, dtype, quant):
    folder = str(small_model)
    config = load_config(folder, ModelSection(name=folder))
    base = load_base(folder, config, quant=quant, dtype=dtype, device=torch.device("cuda", 0), revision=None)
    assert base.verdict.holds and base.verdict.evidence.startswith("21 of 21 tensors")
    one, other = (layer.mlp for layer in base.model.model.layers)
    one.up_proj, other.up_proj = other.up_proj, one.up_proj
    verdict = compare_with_files(base.model, read_headers(folder, None))
    assert not verdict.holds and verdict.evidence.startswith("19 of 21 tensors")
