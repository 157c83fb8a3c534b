import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.model.families import FAMILIES
from launcher.model.packed import use_native_norm
from tests.support.family_figures import config_of
from tests.support.tensors import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [name for name in sorted(FAMILIES) if not name.startswith("gemma")])
def test_the_native_norm_is_at_least_as_exact_as_the_familys_own(model_type, dtype):
    torch.manual_seed(0)
    norm = AutoModelForCausalLM.from_config(config_of(model_type)).model.norm.to(dtype)
    norm.weight.data.normal_(1, 0.2)
    x, upstream = (torch.randn(3, 5, norm.weight.shape[0]).to(dtype) for _ in range(2))
    stock_class = type(norm)
    exact = results(lambda x: rms_norm(x, norm), x.double(), upstream.double())
    stock = results(norm, x, upstream)
    use_native_norm(norm)
    native = results(norm, x, upstream)
    assert isinstance(norm, stock_class) and type(norm) is not stock_class
    for ours, theirs, true in zip(native, stock, exact, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, true) <= 1.01 * relative_error(theirs, true) < 0.01


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_norm_that_multiplies_by_one_plus_its_weight_stays_as_it_is(model_type):
    norm = AutoModelForCausalLM.from_config(config_of(model_type)).model.norm
    stock = type(norm)
    use_native_norm(norm)
    assert type(norm) is stock


def results(function, x, upstream):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


def rms_norm(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()
