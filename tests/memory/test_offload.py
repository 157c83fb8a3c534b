"""The layers' inputs on the host, on a CPU: everything but the streams. tests/gpu has these."""

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import MemoryExhausted
from launcher.memory.offload import INPUTS_ON_DEVICE, MIB, HostInputs
from launcher.model.packed import nothing_around
from launcher.train.describe import start_record
from launcher.train.step import arguments
from tests.conftest import TINY, small_config
from tests.support.workers import ANY, TWO, compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")
LAYERS = 6


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory):
    """A model folder: the small one of the suite, deeper."""
    folder = tmp_path_factory.mktemp("six-layers")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(num_hidden_layers=LAYERS)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


@pytest.fixture
def worker_of(make_recipe, six_layers):
    """Factory of workers past warm-up, with adapters that matter, and what compiles nothing more."""

    def make(activations, lengths=ANY, **data):
        recipe = make_recipe(
            model={"name": str(six_layers)}, memory={"activations": activations}, data=data, train={"accumulation": 2}
        )
        worker = compiled(recipe, documents(lengths))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in worker.step.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return worker

    return make


def gradients(worker):
    return [parameter.grad.clone() for parameter in worker.step.parameters]


def test_losses_and_gradients_are_bit_for_bit_those_of_full_in_the_same_graphs(worker_of):
    found = []
    for activations in ("full", "offload"):
        worker = worker_of(activations, TWO, batching="bucketed")
        losses, grads = [], []
        for _ in range(2):
            batch = next(worker.batches)
            losses.append(float(worker.step.accumulate(batch)))  # two micro batches
            grads.append(gradients(worker))
            losses.append(float(worker.step(batch).loss_sum))
            losses += [float(worker.step.eval_loss(micro)) for micro in batch.micro_batches]
        worker.plan.check()
        record = worker.observer.record()
        assert record.graphs_by_region == {"layer": 4, "loss": 2}  # two widths
        assert (record.recompiles, record.graph_breaks, record.limit_hits) == (0, 0, 0)
        found.append((losses, grads, record.graph_hash, start_record(worker).activations))
    (losses, grads, graphs, said), (theirs, their_grads, their_graphs, their_said) = found
    assert losses == theirs and len(set(losses)) == 6
    assert len(worker.step._calls) == 2
    for ours, others in zip(grads, their_grads, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    assert all(gradient.any() for gradient in grads[0])
    assert graphs == their_graphs
    assert worker.policy.name == "offload" and worker.policy.kept.on_host
    assert worker.host_inputs.host_mib == (LAYERS - 2) * 2 * (8 + 64) * 64 * 4 / MIB  # of two widths, fp32
    worker.host_inputs._host["more"] = torch.empty(3 * MIB, dtype=torch.uint8)
    assert start_record(worker).activations == "offload (as asked, inputs in 3 MiB of the host)"
    assert (said, their_said) == ("full (as asked)", "offload (as asked, inputs in 0 MiB of the host)")


class Watched:
    """Counts the inputs that are on the device whenever a layer is called and an input has come back."""

    def __init__(self, worker, monkeypatch):
        self.inputs, self.forward, self.backward = [], [], []  # how many were there, each time
        around, fetched = worker.built.packed.body.around, HostInputs._fetched

        def called(number, hidden):
            self.forward.append(self.live_with(hidden))
            return around(number, hidden)

        def came_back(self_, host):
            copy = fetched(self_, host)
            self.backward.append(self.live_with(copy.on_device))
            return copy

        worker.built.packed.body.around = called
        monkeypatch.setattr(HostInputs, "_fetched", came_back)

    def live(self):
        return len({ref.cdata for ref in self.inputs if not ref.expired()})

    def live_with(self, tensor):
        self.inputs.append(StorageWeakRef(tensor.untyped_storage()))
        return self.live()


@pytest.mark.parametrize("activations", ["full", "offload"])
def test_three_inputs_are_on_the_device_at_a_time(worker_of, monkeypatch, activations):
    worker = worker_of(activations)
    watched = Watched(worker, monkeypatch)
    batch = next(worker.batches)
    worker.step.accumulate(batch)
    passes = len(batch.micro_batches)
    if activations == "full":
        assert watched.forward == [*range(1, LAYERS + 1)] * passes
        assert watched.backward == []
    else:
        assert watched.forward == [1, 2, 3, 3, 3, 3] * passes
        assert watched.backward == [INPUTS_ON_DEVICE] * (LAYERS - 2) * passes  # each while another layer's is read
    assert watched.live() == 0


class Late(HostInputs):
    """Whose copies happen only when they are waited for, in the order in which they were asked for."""

    def __init__(self):
        super().__init__(LAYERS, torch.device("cpu"))
        self.asked, self.happened, self.waited_for = [], 0, []

    def _copied(self, target, source):
        target.fill_(float("nan"))
        self.asked.append((target, source))
        return len(self.asked)

    def _join(self, copy):
        for target, source in self.asked[self.happened : copy.done]:
            target.copy_(source)
        self.happened = max(self.happened, copy.done)
        self.waited_for.append(copy.done)


def test_copies_may_end_as_late_as_they_are_waited_for_and_none_is_left_under_way(worker_of):
    worker = worker_of("offload")
    batch, found = next(worker.batches), []
    late = Late()
    for around in (worker.built.packed.body.around, late.around):
        worker.built.packed.body.around = around
        worker.step.accumulate(batch)
        found.append(gradients(worker))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sorted(late.waited_for) == list(range(1, 1 + 2 * len(batch.micro_batches) * (LAYERS - 2)))
    assert not (late._leaving or late._away or late._coming)


class Stream:
    """Stands for a CUDA stream: writes down what it is told."""

    def __init__(self, name, told):
        self.name, self.told, self.events = name, told, 0

    def record_event(self):
        self.events += 1
        return f"{self.name}{self.events}"

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.wait_event(other.record_event())


def test_each_copy_waits_for_the_stream_that_asks_and_is_waited_for_one_layer_later(monkeypatch):
    told = []
    main, inputs = Stream("main", told), HostInputs(4, torch.device("cpu"))
    inputs._stream = Stream("copies", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(HostInputs, "_buffer", lambda self, number, hidden: torch.empty_like(hidden))  # not pinned
    hidden = torch.randn(2, 3).requires_grad_()
    for number in range(4):
        told.append(f"layer {number}")
        with inputs.around(number, hidden):
            hidden = hidden * hidden.tanh()  # reads its input once in the backward pass, as a recomputed layer does
        hidden.register_hook(lambda gradient, number=number: told.append(f"backward {number}"))
    hidden.sum().backward()
    assert told == [
        "layer 0",
        "layer 1", "copies waits for main1",
        "layer 2", "copies waits for main2", "main waits for copies1",
        "layer 3", "main waits for copies2",
        "backward 3", "copies waits for main3",
        "backward 2", "copies waits for main4", "main waits for copies3",
        "backward 1", "main waits for copies4",
        "backward 0",
    ]  # fmt: skip


def test_evaluation_copies_nothing(worker_of, monkeypatch):
    worker = worker_of("offload")
    copied = []
    monkeypatch.setattr(HostInputs, "_copied", lambda self, target, source: copied.append(target))
    [micro, _] = next(worker.batches).micro_batches
    worker.step.eval_loss(micro)
    assert copied == []
    with torch.enable_grad():
        worker.built.packed(*arguments(micro))
    assert len(copied) == LAYERS - 2


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_pass_that_ends_half_way_leaves_the_next_one_right(worker_of, half):
    worker = worker_of("offload")
    body, one, other = worker.built.packed.body, next(worker.batches), next(worker.batches)
    worker.step.accumulate(one)
    right = gradients(worker)
    around = body.around

    def failing(number, hidden):
        if number == 3 and half == "forward":
            raise KeyboardInterrupt
        if number == 3:
            hidden.register_hook(lambda gradient: 1 / 0)
        return around(number, hidden)

    body.around = failing
    with pytest.raises(KeyboardInterrupt if half == "forward" else ZeroDivisionError):
        worker.step.accumulate(other)
    body.around = around
    worker.step.accumulate(one)
    assert all(torch.equal(a, b) for a, b in zip(gradients(worker), right, strict=True))


def test_a_backward_pass_after_another_forward_pass_is_an_error_not_a_wrong_gradient(worker_of):
    worker = worker_of("offload")
    one, two = (arguments(micro) for micro in next(worker.batches).micro_batches)
    packed, parameters = worker.built.packed, worker.step.parameters
    first = packed(*one)
    alone = torch.autograd.grad(first, parameters, retain_graph=True)
    again = torch.autograd.grad(first, parameters, retain_graph=True)  # asked back a second time
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    with torch.no_grad():
        packed(*two)
    assert torch.equal(torch.autograd.grad(first, parameters, retain_graph=True)[0], alone[0])
    second = packed(*two)
    with pytest.raises(AssertionError, match="before the backward pass of the last one"):
        torch.autograd.grad(first, parameters)
    assert torch.autograd.grad(second, parameters)[0].any()


def test_what_pinned_buffers_take_of_the_host_is_said_as_torch_rounds_it():
    inputs = HostInputs(4, torch.device("cpu"))
    inputs._host = {number: torch.empty(size, dtype=torch.uint8) for number, size in enumerate((3 * MIB, 4 * MIB))}
    assert inputs.host_mib == 7
    inputs._stream = Stream("copies", [])
    assert inputs.host_mib == 8


def test_a_host_without_room_is_named_with_what_was_wanted(monkeypatch):
    def no_room(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nand how to debug it")

    monkeypatch.setattr(torch, "empty_like", no_room)
    inputs, hidden = HostInputs(18, torch.device("cpu")), torch.zeros(2, 2**18)
    with pytest.raises(
        MemoryExhausted, match=r"needs 32 MiB .* \(2, 262144\); .*: CUDA error: out of memory\nUse"
    ) as caught:
        for number in range(3):
            with inputs.around(number, hidden):
                pass
    assert caught.value.code == 6
    assert caught.value.__cause__ is not None


def test_layers_that_run_uncompiled_get_their_inputs_back_too(worker_of):
    worker = worker_of("offload")
    worker.plan.fall_back("as compile.mode=warn does")
    batch, found = next(worker.batches), []
    for around in (worker.built.packed.body.around, nothing_around):
        worker.built.packed.body.around = around
        found.append((float(worker.step.accumulate(batch)), gradients(worker)))
    (loss, ours), (their_loss, theirs) = found
    assert loss == their_loss
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
