"""The checks before a run, on a GPU where they hold."""

import gc

import pytest
import torch

from launcher.errors import MemoryExhausted
from launcher.memory.ledger import Ledger
from launcher.model.build import check_model
from launcher.model.load import load_config
from launcher.preflight.machine import check_bitsandbytes, check_compiler, check_device
from launcher.preflight.space import check_memory
from tests.conftest import request_for
from tests.support.runs import record_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
CUDA = torch.device("cuda", 0)


def test_device_library_and_compiler_of_this_machine_hold(make_recipe):
    recipe = make_recipe(compile={"backend": "inductor"})
    assert "compute capability" in check_device(CUDA)
    assert check_bitsandbytes(recipe, CUDA) == "quantises on cuda:0"
    assert check_compiler(recipe, CUDA)


def test_the_forecast_before_the_data_is_read_is_that_of_the_run(recipe_1b, monkeypatch):
    recipe = recipe_1b(memory={"activations": "none"})
    source = request_for(recipe).source
    config = load_config(source, recipe.model)
    model = check_model(recipe, source, config, CUDA)
    found = check_memory(recipe, config, model, CUDA)
    planned_mib = float(found.partition(" MiB")[0].replace(",", ""))
    gc.collect()
    held_mib = Ledger(CUDA).used_mib()  # by what other tests of this process left
    assert planned_mib + held_mib == pytest.approx(record_of(recipe).start.forecast_mib, rel=0.05)
    monkeypatch.setattr(Ledger, "free_mib", lambda self: 1.0)
    with pytest.raises(MemoryExhausted, match="free on cuda:0"):
        check_memory(recipe, config, model, CUDA)
