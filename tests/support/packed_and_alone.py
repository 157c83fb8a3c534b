"""One set of adapters in two models: packed and compiled, and stock transformers on one document at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.documents import Document, Documents
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.micro_batch import IGNORE, MicroBatch, micro_batch_of
from launcher.data.pack.packing import pack
from launcher.model.build import BuiltModel
from launcher.recipe.schema import Recipe
from launcher.train.compiled_regions import regions_of
from launcher.train.step import arguments
from tests.conftest import WIDTH
from tests.support.models import build
from tests.support.tensors import add_noise

LENGTHS = (64, 40, 23, 30, 17, 9, 7, 2)  # 64 fills its block


def random_documents(seed: int) -> list[Document]:
    """Of LENGTHS, most of their tokens supervised."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, WIDTH["vocab_size"], n).astype(np.int32) for n in LENGTHS]
    return [Document(tokens, np.append(rng.random(len(tokens) - 1) < 0.7, True)) for tokens in ids]


@dataclass
class PackedAndAlone:
    """The same adapters twice: `packed` compiled in one planned shape, `stock` as transformers runs it."""

    packed: BuiltModel
    stock: BuiltModel
    plan: Plan
    blocks: Blocks
    batch: MicroBatch

    def loss_of(self, document: int, batch: MicroBatch) -> Tensor:
        """The loss of that document alone, with all others in their blocks."""
        block, number = next((b, d.tolist().index(document)) for b, d in enumerate(self.blocks) if document in d)
        in_document = torch.zeros_like(batch.document_ids, dtype=torch.bool)
        in_document[block] = batch.document_ids[block] == number
        only = replace(batch, labels=torch.where(in_document, batch.labels, IGNORE))
        loss: Tensor = self.plan.call(self.packed.packed, *arguments(only))
        return loss

    def packed_loss(self) -> Tensor:
        """The summed loss of the whole batch."""
        loss: Tensor = self.plan.call(self.packed.packed, *arguments(self.batch))
        return loss

    def losses(self) -> tuple[list[float], list[float]]:
        """The loss of each document, packed and alone."""
        with torch.no_grad():
            packed = [float(self.loss_of(index, self.batch)) for index in range(len(LENGTHS))]
            return packed, [float(alone_loss(self.stock, document)) for document in random_documents(0)]

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the packed batch at once, and of its documents one by one."""
        self.packed_loss().backward()
        for document in random_documents(0):
            alone_loss(self.stock, document).backward()
        return take_gradients(self.packed), take_gradients(self.stock)


@contextmanager
def packed_and_alone(device: str, *, model: Path, dtype: str, backend: str) -> Iterator[PackedAndAlone]:
    """Both models on the device, the packed one compiled with `backend` and past warm-up."""
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
    packed, stock = (build(recipe, device=device) for _ in range(2))
    for model_of in (packed, stock):
        add_noise(parameter for parameter in model_of.packed.parameters() if parameter.requires_grad)
    stock.peft.base_model.model.set_attn_implementation("eager")
    blocks = pack(Documents.of(random_documents(0)), np.arange(len(LENGTHS)), max_length=64, pad_id=0, seed=0)
    assert len(blocks) == 3
    batch = micro_batch_of(blocks, np.array([0, 1, 2, -1])).to(torch.device(device))
    plan = Plan(regions_of(packed, shapes=1), compile=recipe.compile, observer=Observer())

    def planned() -> None:
        packed.packed(*arguments(batch)).backward()
        with torch.no_grad():
            packed.packed(*arguments(batch))

    plan.warm_up(planned)
    take_gradients(packed)
    plan.arm()
    try:
        yield PackedAndAlone(packed, stock, plan, blocks, batch)
    finally:
        plan.release()
        torch._dynamo.reset()


def take_gradients(built: BuiltModel) -> list[Tensor]:
    """The gradients of the adapters, which are cleared."""
    gradients = []
    for parameter in built.packed.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            parameter.grad = None
    return gradients


def alone_loss(built: BuiltModel, document: Document) -> Tensor:
    """The summed loss over the supervised tokens of one document, alone in its batch, in stock transformers."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64))[None].to(built.packed.cos.device)
    logits = built.peft(input_ids=ids).logits[0, :-1].float()
    targets = torch.where(torch.from_numpy(document.supervised).to(ids.device), ids[0], IGNORE)[1:]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
