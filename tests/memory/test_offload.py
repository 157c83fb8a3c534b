"""Offload of the layers' inputs to the host, on a CPU: everything except real streams, which tests/gpu has."""

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import MemoryExhausted
from launcher.memory.ledger import MIB
from launcher.memory.offload import INPUTS_ON_DEVICE, HostInputs
from launcher.model.packed import nothing_around
from launcher.train.describe import start_record
from launcher.train.step import arguments
from tests.conftest import TINY, fresh_dynamo, small_config, small_recipe
from tests.support.workers import ANY, TWO, compiled, documents, perturb

LAYERS = 6


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory):
    """A folder with a small model of six layers."""
    folder = tmp_path_factory.mktemp("six-layers")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(num_hidden_layers=LAYERS)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


def perturbed(recipe, lengths=ANY):
    """A worker past warm-up on documents of these lengths; its adapters are perturbed."""
    worker = compiled(recipe, documents(lengths))
    perturb(worker)
    return worker


@pytest.fixture(scope="module")
def recipe_of(six_layers, rows_file):
    """Recipe factory: two micro batches a step."""

    def make(activations, *, mode="strict", **data):
        sections = {"memory": {"activations": activations}, "data": data, "train": {"accumulation": 2}}
        sections["compile"] = {"mode": mode}
        return small_recipe(six_layers, rows_file, six_layers, **sections)

    return make


@pytest.fixture(scope="module")
def offloading(recipe_of):
    """A worker that offloads, in tests that stand together: dynamo forgets its graphs in a test with `clean_dynamo`."""
    with fresh_dynamo():
        yield perturbed(recipe_of("offload"))


def measured(worker, batch):
    """Loss and gradients of a batch."""
    loss = float(worker.step.accumulate(batch))
    return loss, [parameter.grad.clone() for parameter in worker.step.parameters]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.usefixtures("clean_dynamo")
def test_losses_and_gradients_are_bit_for_bit_those_of_full_in_the_same_graphs(recipe_of):
    runs = []
    for activations in ("full", "offload"):
        worker = perturbed(recipe_of(activations, batching="bucketed"), TWO)
        assert start_record(worker).activations.startswith(f"{activations} (as asked")
        losses, gradients = [], []
        for _ in range(2):
            batch = next(worker.batches)  # two micro batches
            loss, grads = measured(worker, batch)
            gradients.append(grads)
            losses += [loss, float(worker.step(batch).loss_sum)]
            losses += [float(worker.step.eval_loss(micro)) for micro in batch.micro_batches]
        worker.plan.check()
        record = worker.observer.record()
        assert record.graphs_by_region == {"layer": 4, "loss": 2}  # two widths
        assert (record.recompiles, record.graph_breaks, record.limit_hits) == (0, 0, 0)
        runs.append((losses, gradients, record.graph_hash))
    assert runs[0][2] == runs[1][2]
    assert_equal(runs[1][:2], runs[0][:2])
    assert len(set(losses)) == 6 and all(gradient.any() for gradient in gradients[0])
    assert worker.host_inputs.host_mib == (LAYERS - 2) * 2 * (8 + 64) * 64 * 4 / MIB  # of two widths, fp32
    worker.host_inputs.buffers["more"] = torch.empty(3 * MIB, dtype=torch.uint8)
    assert start_record(worker).activations == "offload (as asked, inputs in 3 MiB of the host)"


class Watched:
    """Counts the inputs on the device whenever a layer is called and whenever an input is fetched back."""

    def __init__(self, worker, monkeypatch):
        self.inputs, self.forward, self.backward = [], [], []  # of the last two: counts
        around, fetch = worker.built.packed.body.around, HostInputs.fetch

        def counting_around(number, hidden):
            self.forward.append(self.live_with(hidden))
            return around(number, hidden)

        def counting_fetch(self_, host):
            copy = fetch(self_, host)
            self.backward.append(self.live_with(copy.on_device))
            return copy

        worker.built.packed.body.around = counting_around
        monkeypatch.setattr(HostInputs, "fetch", counting_fetch)

    def live(self):
        return len({ref.cdata for ref in self.inputs if not ref.expired()})

    def live_with(self, tensor):
        self.inputs.append(StorageWeakRef(tensor.untyped_storage()))
        return self.live()


@pytest.mark.parametrize("activations", ["full", "offload"])
@pytest.mark.usefixtures("clean_dynamo")
def test_three_inputs_are_on_the_device_at_a_time(recipe_of, monkeypatch, activations):
    worker = perturbed(recipe_of(activations))
    watched = Watched(worker, monkeypatch)
    batch = next(worker.batches)
    worker.step.accumulate(batch)
    passes = len(batch.micro_batches)
    if activations == "full":
        assert watched.forward == [*range(1, LAYERS + 1)] * passes
        assert watched.backward == []
    else:
        assert watched.forward == [1, 2, 3, 3, 3, 3] * passes
        assert watched.backward == [INPUTS_ON_DEVICE] * (LAYERS - 2) * passes  # while another layer's input is read
    assert watched.live() == 0


class Late(HostInputs):
    """Makes each copy only when it is waited for, in the order in which copies were started."""

    def __init__(self):
        super().__init__(LAYERS, torch.device("cpu"))
        self.started, self.done, self.waited_for = [], 0, []

    def start_copy(self, target, source):
        target.fill_(float("nan"))
        self.started.append((target, source))
        return len(self.started)

    def wait_for(self, copy):
        for target, source in self.started[self.done : copy.done]:
            target.copy_(source)
        self.done = max(self.done, copy.done)
        self.waited_for.append(copy.done)


def test_copies_may_end_as_late_as_they_are_waited_for_and_all_are_waited_for(offloading, monkeypatch):
    batch, late = next(offloading.batches), Late()
    undisturbed = measured(offloading, batch)
    monkeypatch.setattr(offloading.built.packed.body, "around", late.around)
    assert_equal(measured(offloading, batch), undisturbed)
    assert sorted(late.waited_for) == list(range(1, 1 + 2 * len(batch.micro_batches) * (LAYERS - 2)))
    assert not (late.to_host or late.on_host or late.to_device)


class Stream:
    """Stands for a CUDA stream: logs what it waits for."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        self.events += 1
        return f"{self.name}{self.events}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.wait_event(other.record_event())


def test_each_copy_waits_for_the_stream_that_starts_it_and_is_waited_for_one_layer_later(monkeypatch):
    log = []
    main, inputs = Stream("main", log), HostInputs(4, torch.device("cpu"))
    inputs.stream = Stream("copies", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(HostInputs, "buffer_for", lambda self, number, hidden: torch.empty_like(hidden))  # not pinned
    hidden = torch.randn(2, 3).requires_grad_()
    for number in range(4):
        log.append(f"layer {number}")
        with inputs.around(number, hidden):
            hidden = hidden * hidden.tanh()  # reads its input once in the backward pass, as a recomputed layer does
        hidden.register_hook(lambda gradient, number=number: log.append(f"backward {number}"))
    hidden.sum().backward()
    assert log == [
        "layer 0",
        "layer 1", "copies waits for main1",
        "layer 2", "copies waits for main2", "main waits for copies1",
        "layer 3", "main waits for copies2",
        "backward 3", "copies waits for main3",
        "backward 2", "copies waits for main4", "main waits for copies3",
        "backward 1", "main waits for copies4",
        "backward 0",
    ]  # fmt: skip


def test_evaluation_copies_nothing(offloading, monkeypatch):
    copied = []
    monkeypatch.setattr(HostInputs, "start_copy", lambda self, target, source: copied.append(target))
    [micro, _] = next(offloading.batches).micro_batches
    offloading.step.eval_loss(micro)
    assert copied == []
    offloading.built.packed(*arguments(micro))
    assert len(copied) == LAYERS - 2


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_pass_that_ends_half_way_does_not_disturb_the_next_one(offloading, monkeypatch, half):
    body, one, other = offloading.built.packed.body, next(offloading.batches), next(offloading.batches)
    undisturbed = measured(offloading, one)
    around = body.around

    def failing(number, hidden):
        if number == 3 and half == "forward":
            raise KeyboardInterrupt
        if number == 3:
            hidden.register_hook(lambda gradient: 1 / 0)
        return around(number, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(body, "around", failing)
        with pytest.raises(KeyboardInterrupt if half == "forward" else ZeroDivisionError):
            offloading.step.accumulate(other)
    assert_equal(measured(offloading, one), undisturbed)


def test_a_backward_pass_after_another_forward_pass_is_an_error_not_a_wrong_gradient(offloading):
    one, two = (arguments(micro) for micro in next(offloading.batches).micro_batches)
    packed, parameters = offloading.built.packed, offloading.step.parameters
    first = packed(*one)
    alone = torch.autograd.grad(first, parameters, retain_graph=True)
    again = torch.autograd.grad(first, parameters, retain_graph=True)  # fetched a second time
    assert_equal(again, alone)
    with torch.no_grad():
        packed(*two)
    assert torch.equal(torch.autograd.grad(first, parameters, retain_graph=True)[0], alone[0])
    second = packed(*two)
    with pytest.raises(AssertionError, match="before the backward pass of the last one"):
        torch.autograd.grad(first, parameters)
    assert torch.autograd.grad(second, parameters)[0].any()


def test_the_reported_host_memory_is_rounded_up_as_torch_rounds_pinned_memory():
    inputs = HostInputs(4, torch.device("cpu"))
    inputs.buffers = {number: torch.empty(size, dtype=torch.uint8) for number, size in enumerate((3 * MIB, 4 * MIB))}
    assert inputs.host_mib == 7
    inputs.stream = Stream("copies", [])
    assert inputs.host_mib == 8


def test_a_host_without_enough_memory_is_an_error_that_says_how_much_was_needed(monkeypatch):
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


@pytest.mark.usefixtures("clean_dynamo")
def test_uncompiled_layers_get_their_inputs_back_too(recipe_of):
    worker = perturbed(recipe_of("offload", mode="warn"))
    worker.plan.fall_back("as compile.mode=warn does")
    batch = next(worker.batches)
    offloaded = measured(worker, batch)
    worker.built.packed.body.around = nothing_around
    assert_equal(offloaded, measured(worker, batch))
