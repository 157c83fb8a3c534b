"""The rows of single tokens in the input embedding and in the output head, trained beside LoRA: lora.trainable_tokens.

PEFT keeps them as `trainable_tokens_delta` [n, D], fp32 masters of the rows themselves, and makes a copy of the whole
matrix with these rows in every forward pass. Here they are written, in the model's dtype, into the frozen matrix itself
before each forward pass: n rows, and all that reads the matrix computes with them. Their gradients are made where the
matrices are used: ops/token_rows.py for the embedding, ops/linear_ce.py for the head.

Where the head is tied to the embedding, one parameter stands for both, and has the sum of both gradients. Where it is
not, each has its own: a token is read by its row of the embedding, and written by that of the head.

Letters: V vocabulary, D model width, n trained tokens, B blocks, S positions.
"""

from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from launcher.model.lora import ADAPTER
from launcher.ops.token_rows import NO_ROW, with_row_gradients


def unwrapped(module: Any) -> Any:
    """An embedding or a head as transformers made it, without PEFT's wrapper of trained tokens."""
    return module.original_module if isinstance(module, TrainableTokensWrapper) else module


class TrainedTokens(nn.Module):
    """The trained rows of embedding and head of `causal_lm`, which PEFT has wrapped; the parameters are PEFT's own."""

    ids: Tensor
    slots: Tensor

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        wrapped = causal_lm.model.embed_tokens, causal_lm.lm_head
        assert all(isinstance(one, TrainableTokensWrapper) for one in wrapped), "tokens are trained in both"
        self.embedding_rows, self.head_rows = (one.token_adapter.trainable_tokens_delta[ADAPTER] for one in wrapped)
        embedding, head = map(unwrapped, wrapped)
        self._weights = tuple({id(one.weight): one.weight for one in (embedding, head)}.values())
        assert len(self._weights) == 2 or self.embedding_rows is self.head_rows, "one matrix has one value of a row"
        scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0))
        self._scale = float(scale.to(embedding.weight.dtype))  # as the embedding rounds it
        indices: Any = wrapped[0].token_adapter.token_indices[ADAPTER]
        ids = torch.tensor(indices, device=embedding.weight.device)
        slots = torch.full((len(embedding.weight),), NO_ROW, dtype=torch.int32, device=ids.device)
        slots[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        if embedding.padding_idx is not None:  # as torch's embedding, whose gradient leaves that row out
            slots[embedding.padding_idx] = NO_ROW
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    @torch.no_grad()
    def write(self) -> None:
        """Put the rows, as they are now, into the matrices."""
        for weight, rows in zip(self._weights, (self.embedding_rows, self.head_rows), strict=False):
            weight.index_copy_(0, self.ids, rows.to(weight.dtype))

    def reached_by(self, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """`embedded` [B, S, D], the embedding's output for input_ids [B, S], whose gradient reaches the rows too."""
        return with_row_gradients(embedded, self.embedding_rows, self.slots[input_ids], scale=self._scale)


def trained_tokens(causal_lm: Any) -> TrainedTokens | None:
    """The trained tokens of a model with adapters; None: it has none."""
    return TrainedTokens(causal_lm) if isinstance(causal_lm.model.embed_tokens, TrainableTokensWrapper) else None
