"""The forward pass of training: a batch of blocks (packed sequences) in, the summed loss out, without any wait for the
host.

Letters: B blocks, S positions of a block, D model width, E head width.

transformers' own model forward builds masks and positions with host synchronisations and data-dependent branches. This
one builds the rotary table once, the document mask once per batch, and calls the decoder layers directly. Layers,
norms and projections are the stock modules.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.ops.document_attention import document_mask
from launcher.ops.embedding_noise import embedding_noise
from launcher.ops.linear_ce import ChunkFunctions, linear_cross_entropy


def nothing_around(number: int, hidden: Tensor) -> AbstractContextManager[None]:
    """The default of `Body.around`: nothing is done with a layer's input."""
    return nullcontext()


class Body(nn.Module):
    """Decoder layers and final norm: the stock modules themselves, not copies.

    `around(number, input)` gives the context in which a layer is called; its input is [B, S, D] (memory/offload.py).
    """

    around: Callable[[int, Tensor], AbstractContextManager[None]]

    def __init__(self, layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm
        self.around = nothing_around

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """hidden [B, S, D], cos and sin [B, S, E], mask [B, 1, S, S] (added to the scores) or None, cu_seqlens
        [documents + 1] and the bound on their length -> [B, S, D]."""
        boundaries = {"attention_mask": mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        for number, layer in enumerate(self.layers):
            with self.around(number, hidden):
                hidden = layer(hidden, position_embeddings=(cos, sin), **boundaries)
        return self.norm(hidden)


class PackedCausalLM(nn.Module):
    """Summed next-token loss of packed blocks, for a causal LM whose attention is one of model/attention.py.

    `max_length`: upper bound on S. `loss_chunk`: positions whose logits live at once. `loss_rows`: by the positions
    B * S of a micro batch, for how many of them the loss is computed, where not for all (ops/linear_ce.py).
    `max_seqlen`: upper bound on document length; None: `max_length`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        causal_lm: Any,
        *,
        attention: str,
        max_length: int,
        loss_chunk: int,
        loss_rows: Mapping[int, int] | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        super().__init__()
        decoder = causal_lm.model
        self.body = Body(decoder.layers, decoder.norm)
        self.embed = decoder.embed_tokens
        self.head = causal_lm.lm_head
        self.attention = attention
        self.loss_chunk = loss_chunk
        self.max_seqlen = max_seqlen or max_length
        self._loss_rows = dict(loss_rows or {})
        self.loss_functions = ChunkFunctions()
        self.neftune_alpha = 0.0  # of the noise on the embeddings, where gradients are recorded
        weight = self.embed.weight
        positions = torch.arange(max_length, device=weight.device)[None]
        with torch.no_grad():  # [S, E] each; the model's own rotary module makes them, scaling included
            cos, sin = decoder.rotary_emb(weight[:1, None], positions)
        self.register_buffer("cos", cos[0].contiguous(), persistent=False)
        self.register_buffer("sin", sin[0].contiguous(), persistent=False)

    def loss_rows(self, tokens: int) -> int:
        """The most supervised ones among a micro batch's `tokens`."""
        return self._loss_rows.get(tokens, tokens)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, cu_seqlens: Tensor, *, max_seqlen: int = 0
    ) -> Tensor:
        """input_ids, position_ids, document_ids [B, S], cu_seqlens [documents + 1] -> [B, S, D]. `max_seqlen` replaces
        the model's bound on document length, for documents that are not of the run's data."""
        hidden = self.embed(input_ids)
        if torch.is_grad_enabled():
            if self.neftune_alpha:
                hidden = hidden + embedding_noise(hidden, cu_seqlens, self.neftune_alpha)
            # Nothing below the first layer is trained. Without this, layer 0's input would need no gradient and the
            # other layers' would: two graphs instead of one.
            hidden.requires_grad_()
        mask = None
        if self.attention == "sdpa":
            # Added to the scores. From a boolean mask every layer would make one of these, and keep it.
            visible = document_mask(document_ids)
            mask = hidden.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        cos, sin = self.cos[position_ids], self.sin[position_ids]
        return self.body(hidden, cos, sin, mask, cu_seqlens, max_seqlen or self.max_seqlen)

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, document_ids: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """All [B, S] except cu_seqlens; labels are already shifted -> loss summed over supervised tokens, fp32
        scalar."""
        hidden = self.hidden_states(input_ids, position_ids, document_ids, cu_seqlens)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head.weight,
            labels.flatten(),
            chunk=self.loss_chunk,
            functions=self.loss_functions,
            max_targets=self.loss_rows(labels.numel()),
        )

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Logits [V] of the token after one document, input_ids [1, T]; for the sample after training."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)[None]
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        document_ids = torch.zeros_like(positions, dtype=torch.int32)
        hidden = self.hidden_states(input_ids, positions, document_ids, cu_seqlens, max_seqlen=length)
        return hidden[0, -1] @ self.head.weight.T


def use_native_norm(norm: nn.Module) -> None:
    """Replace the forward of a transformers RMSNorm by torch's kernel, in place; it stays an instance of its class.

    For the final norm with compile.scope=layer, where no compiled graph holds it: transformers' version is some eight
    elementwise operations with fp32 results [B, S, D] in between. torch's is one launch each way and rounds once.
    """
    norm.__class__ = type(f"Native{type(norm).__name__}", (type(norm),), {"forward": _native_norm})


def _native_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """hidden_states [..., D] -> [..., D]."""
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
