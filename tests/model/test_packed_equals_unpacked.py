"""What packing promises: a document in a row, compiled, learns what it would learn alone, in stock transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.documents import Document, Documents
from launcher.data.loader import MicroBatch, micro_batch_of
from launcher.data.pack.blocks import IGNORE, Blocks
from launcher.data.pack.packing import pack
from launcher.model.attention import BlockFacts
from launcher.model.build import BuiltModel, build_model
from launcher.model.source import load_config
from launcher.recipe.schema import Recipe
from launcher.train.regions import regions_of
from launcher.train.step import arguments
from tests.conftest import WIDTH

LENGTHS = (64, 40, 23, 30, 17, 9, 7, 2)  # 64 fills its row


def random_documents(seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, WIDTH["vocab_size"], n).astype(np.int32) for n in LENGTHS]
    return [Document(tokens, np.append(rng.random(len(tokens) - 1) < 0.7, True)) for tokens in ids]


@dataclass
class Bench:
    """The same adapters twice: `packed` compiled in one planned shape, `stock` as transformers runs it."""

    packed: BuiltModel
    stock: BuiltModel
    plan: Plan
    blocks: Blocks
    batch: MicroBatch

    def loss_of(self, document: int, batch: MicroBatch) -> Tensor:
        """Of that document alone, with all others in their rows."""
        row = int(np.searchsorted(self.blocks.row_offsets, self._place(document), "right")) - 1
        number = self._place(document) - int(self.blocks.row_offsets[row])
        own = torch.zeros_like(batch.document_ids, dtype=torch.bool)
        own[row] = batch.document_ids[row] == number
        only = replace(batch, labels=torch.where(own, batch.labels, IGNORE))
        loss: Tensor = self.plan.call(self.packed.packed, *arguments(only))
        return loss

    def _place(self, document: int) -> int:
        return int(np.flatnonzero(self.blocks.row_documents == document)[0])


def perturb(built: BuiltModel) -> None:
    """LoRA B starts at zero, and then no gradient of A has a direction."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.packed.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.05)


@contextmanager
def bench_on(device: str, *, model: Path, dtype: str, backend: str) -> Iterator[Bench]:
    """Both models on the device; also what tests/gpu runs, with generated kernels."""
    torch._dynamo.reset()
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(model), "dtype": dtype},
            "lora": {"r": 4},
            "data": {"max_length": 64},
            "train": {"steps": 1, "micro_batch": 4},
            "compile": {"backend": backend},
        }
    )
    config, where = load_config(str(model), recipe.model), torch.device(device)
    packed, stock = (
        build_model(
            recipe, str(model), config, device=where, blocks=BlockFacts((64,), alone=False), phase=lambda _: None
        )
        for _ in range(2)
    )
    for built in (packed, stock):
        perturb(built)
    stock.peft.base_model.model.set_attn_implementation("eager")
    blocks = pack(Documents.of(random_documents(0)), np.arange(len(LENGTHS)), max_length=64, pad_id=0, seed=0)
    assert blocks.rows == 3
    batch = micro_batch_of(blocks, np.array([0, 1, 2, -1])).to(where)
    plan = Plan(regions_of(packed, shapes=1), compile=recipe.compile, observer=Observer())

    def planned() -> None:
        packed.packed(*arguments(batch)).backward()
        with torch.no_grad():
            packed.packed(*arguments(batch))

    plan.warm_up(planned)
    gradients(packed)
    plan.arm()
    try:
        yield Bench(packed, stock, plan, blocks, batch)
    finally:
        plan.release()
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def bench(small_model: Path) -> Iterator[Bench]:
    with bench_on("cpu", model=small_model, dtype="float32", backend="aot_eager") as made:
        yield made


def gradients(built: BuiltModel) -> list[Tensor]:
    """What `backward` has left, handed over."""
    found = []
    for parameter in built.packed.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.grad = None
    return found


def stock_loss(built: BuiltModel, document: Document) -> Tensor:
    """Summed over the supervised tokens of one document that is alone in its batch."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64))[None].to(built.packed.cos.device)
    logits = built.peft(input_ids=ids).logits[0, :-1].float()
    targets = torch.where(torch.from_numpy(document.supervised).to(ids.device), ids[0], IGNORE)[1:]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest error of a tensor, relative to that tensor."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def losses(bench: Bench) -> tuple[list[float], list[float]]:
    """Of each document, packed and alone."""
    with torch.no_grad():
        packed = [float(bench.loss_of(index, bench.batch)) for index in range(len(LENGTHS))]
        return packed, [float(stock_loss(bench.stock, document)) for document in random_documents(0)]


def both_gradients(bench: Bench) -> tuple[list[Tensor], list[Tensor]]:
    """Of the packed batch at once, and of its documents one by one."""
    bench.plan.call(bench.packed.packed, *arguments(bench.batch)).backward()
    for document in random_documents(0):
        stock_loss(bench.stock, document).backward()
    return gradients(bench.packed), gradients(bench.stock)


def test_each_document_of_a_packed_batch_has_the_loss_it_has_alone(bench: Bench) -> None:
    packed, alone = losses(bench)
    with torch.no_grad():
        whole = float(bench.plan.call(bench.packed.packed, *arguments(bench.batch)))
    assert packed == pytest.approx(alone, rel=1e-5)
    assert whole == pytest.approx(sum(alone), rel=1e-5)
    assert len({round(loss, 3) for loss in alone}) == len(LENGTHS)
    bench.plan.check()


def test_the_gradients_of_a_packed_batch_are_those_of_its_documents_one_by_one(bench: Bench) -> None:
    packed, alone = both_gradients(bench)
    assert relative(packed, alone) < 1e-5
    assert all(float(gradient.norm()) > 1e-3 for gradient in alone)
    stock_loss(bench.stock, random_documents(0)[1]).backward()
    assert relative(packed, gradients(bench.stock)) > 0.1  # one document's would not do
    bench.plan.check()


@pytest.mark.parametrize("poisoned", [0, 3, 7])
def test_a_poisoned_document_changes_no_other_documents_loss_and_no_gradient_of_theirs(
    bench: Bench, poisoned: int
) -> None:
    documents = random_documents(0)
    documents[poisoned] = Document(random_documents(1)[poisoned].input_ids, documents[poisoned].supervised)
    blocks = replace(bench.blocks, documents=Documents.of(documents))
    batch = micro_batch_of(blocks, np.array([0, 1, 2, -1]))
    with torch.no_grad():
        before, after = (torch.stack([bench.loss_of(d, b) for d in range(len(LENGTHS))]) for b in (bench.batch, batch))
    changed = (before != after).tolist()
    assert changed == [document == poisoned for document in range(len(LENGTHS))]
    other = (poisoned + 1) % len(LENGTHS)
    found = []
    for each in (bench.batch, batch):
        bench.loss_of(other, each).backward()
        found.append(gradients(bench.packed))
    assert relative(*found) < 1e-6
    bench.plan.check()
