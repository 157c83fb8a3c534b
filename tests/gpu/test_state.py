"""A state loaded into captured training is written where the graphs read: `pytest -m gpu tests/gpu/test_state.py`."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.checkpoint.bundle import read_bundle, write_bundle
from launcher.train.host_copies import HostCopies
from tests.conftest import TINY, small_config
from tests.support.states import flat, leaves, through_files, train
from tests.support.workers import compiled, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
RANK = 256  # adapters of 131,072 parameters: bitsandbytes pages from 100,000 on


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model folder of two layers, 512 wide."""
    folder = tmp_path_factory.mktemp("wide-model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(hidden_size=512, intermediate_size=1024)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


def places(worker):
    return {name: leaf.data_ptr() for name, leaf in leaves(worker.step.live_state()) if isinstance(leaf, Tensor)}


def adapters(worker):
    return torch.cat([parameter.detach().flatten() for parameter in worker.step.parameters])


@pytest.mark.parametrize(
    ("optimizer", "dtype", "dropout", "saved_from", "loaded_into"),
    [
        ("adamw", "bfloat16", 0.2, "on", "on"),
        ("adamw", "float16", 0.0, "on", "off"),
        ("adamw", "float32", 0.0, "off", "on"),
        ("adamw_8bit", "bfloat16", 0.0, "on", "on"),
        ("paged_adamw", "float16", 0.0, "on", "on"),
        ("paged_adamw_8bit", "bfloat16", 0.0, "off", "off"),
        ("schedule_free_adamw", "bfloat16", 0.0, "on", "on"),
    ],
)
def test_a_resumed_run_goes_on_captured_or_not_with_the_tensors_it_had(
    make_recipe, wide_model, optimizer, dtype, dropout, saved_from, loaded_into
):
    def worker_of(cuda_graphs):
        worker = compiled(
            make_recipe(
                model={"name": str(wide_model), "dtype": dtype},
                lora={"r": RANK, "dropout": dropout},
                compile={"backend": "inductor", "cuda_graphs": cuda_graphs},
                train={"steps": 12, "accumulation": 2, "optimizer": optimizer, "schedule": "constant"},
            )
        )
        assert worker.cuda_graphs.startswith(cuda_graphs), worker.cuda_graphs
        return worker

    whole = worker_of(saved_from)
    perturb(whole)
    train(whole, 4)
    if dtype == "float16":
        whole.step.scaler.update(2.0**12)  # not the one that a run begins with
    middle, start = whole.state.state_dict(), adapters(whole).clone()
    after = train(whole, 4)
    moved = adapters(whole) - start
    whole.plan.release()

    again = worker_of(loaded_into)
    not_resumed, held = train(again, 4), places(again)
    again.state.load_state_dict(through_files(middle))
    assert flat(again.state.state_dict()) == flat(middle)
    assert torch.equal(adapters(again), start)
    resumed = train(again, 4)
    assert places(again) == held
    again.plan.release()

    assert [metrics[2:] for metrics in resumed] == [metrics[2:] for metrics in after]  # rates, and what fp16 skipped
    for part, tolerance in ((0, 1e-3), (1, 2e-2)):  # kernels add in any order: losses and norms are not bit-equal
        expected, fresh = ([m[part] for m in metrics] for metrics in (after, not_resumed))
        assert [m[part] for m in resumed] == pytest.approx(expected, rel=tolerance)
        assert [m[part] for m in resumed] != pytest.approx(fresh, rel=tolerance)
    assert float((adapters(again) - start - moved).norm() / moved.norm()) < 0.2
    assert whole.state.step == again.state.step == 8


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "schedule_free_adamw"])
def test_a_copy_behind_the_next_steps_is_of_the_step_at_which_it_was_begun_and_a_bundle_keeps_it(
    make_recipe, wide_model, tmp_path, optimizer
):
    """Twice, as the second copy uses the first one's memory."""
    train_section = {"steps": 12, "optimizer": optimizer, "schedule": "constant"}
    sections = {"model": {"name": str(wide_model), "dtype": "bfloat16"}, "compile": {"backend": "inductor"}}
    worker, copies = compiled(make_recipe(**sections, lora={"r": RANK}, train=train_section)), HostCopies()
    for step in (2, 4):
        train(worker, 2)
        expected = flat(worker.state.state_dict())
        state, wait = worker.state.begin_copy(copies)
        assert any(leaf.is_pinned() for _, leaf in leaves(state) if isinstance(leaf, Tensor))
        train(worker, 1)
        wait()
        assert flat(state) == expected
        bundle = write_bundle(tmp_path, state, step=step, adapter=lambda folder: folder.mkdir())
        assert flat(read_bundle(bundle)) == expected
    worker.plan.release()
