"""The forward pass of training: a batch of blocks (packed sequences) in, the summed loss out, without any wait for the
host.

Letters: B blocks, S positions of a block, D model width, E head width.

transformers' own model forward builds masks and positions with host synchronisations and data-dependent branches. This
one builds the rotary table once, the document mask once per batch, and calls the decoder layers directly. Layers,
norms and projections are the stock modules.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.model.attention import MASKED
from launcher.model.layer_kinds import layer_kinds
from launcher.model.logits import finished_logits, logits_rule
from launcher.model.trained_tokens import trained_tokens, unwrapped
from launcher.ops.capped_ce import chunk_functions
from launcher.ops.document_attention import document_mask, within_window
from launcher.ops.embedding_noise import embedding_noise
from launcher.ops.linear_ce import TrainedRows, linear_cross_entropy


def nothing_around(number: int, hidden: Tensor) -> AbstractContextManager[None]:
    """The default of `Body.around`: nothing is done with a layer's input."""
    return nullcontext()


class KindInputs(NamedTuple):
    """What the layers of one kind are called with beside their input: cos and sin [B, S, E]; mask [B, 1, S, S], added
    to the scores, or None; tokens of the sliding window where no mask has it, or None."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    window: int | None


class Body(nn.Module):
    """Decoder layers and final norm: the stock modules themselves, not copies. `kinds`: the number of each layer's kind
    among the inputs of `forward`.

    `around(number, input)` gives the context in which a layer is called; its input is [B, S, D] (memory/offload.py).
    """

    around: Callable[[int, Tensor], AbstractContextManager[None]]

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, kinds: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm
        self.kinds = kinds
        self.around = nothing_around

    def forward(self, hidden: Tensor, inputs: tuple[KindInputs, ...], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """hidden [B, S, D], inputs by kind of layer, cu_seqlens [documents + 1] and the bound on their length ->
        [B, S, D]."""
        for number, layer in enumerate(self.layers):
            kind = inputs[self.kinds[number]]
            boundaries = {"attention_mask": kind.mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            with self.around(number, hidden):
                hidden = layer(hidden, position_embeddings=(kind.cos, kind.sin), window=kind.window, **boundaries)
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
        kinds = layer_kinds(causal_lm.config, max_length=max_length)
        self.kinds = tuple(dict.fromkeys(kinds))
        self.body = Body(decoder.layers, decoder.norm, tuple(map(self.kinds.index, kinds)))
        self.embed = unwrapped(decoder.embed_tokens)
        self.head = unwrapped(causal_lm.lm_head)
        self.trained = trained_tokens(causal_lm)
        self.attention = attention
        # By kind, where attention takes the window as a number; elsewhere it is in the mask.
        self.windows = tuple(kind.window if attention == "varlen" else None for kind in self.kinds)
        self.loss_chunk = loss_chunk
        self.max_seqlen = max_seqlen or max_length
        self.loss_bounds = dict(loss_rows or {})
        self.neftune_alpha = 0.0  # of the noise on the embeddings, where gradients are recorded
        self.embedding_multiplier: float = getattr(decoder, "embedding_multiplier", 1.0)
        self.logits_rule = logits_rule(causal_lm.config)
        self.loss_functions = chunk_functions(self.logits_rule.cap)
        self._tables = tuple(dict.fromkeys(kind.table for kind in self.kinds))
        positions = torch.arange(max_length, device=self.embed.weight.device)[None]
        for table in self._tables:
            self._add_table(decoder.rotary_emb, positions, table)

    def _add_table(self, rotary: Any, positions: Tensor, table: str) -> None:
        """Keep cos and sin [S, E]; the model's own rotary module makes them, scaling included."""
        with torch.no_grad():
            cos, sin = rotary(self.embed.weight[:1, None], positions, *([table] if table else []))
        suffix = "" if table == self._tables[0] else f"_{table}"
        self.register_buffer(f"cos{suffix}", cos[0].contiguous(), persistent=False)
        self.register_buffer(f"sin{suffix}", sin[0].contiguous(), persistent=False)

    def layer_code(self) -> list[tuple[Any, ...]]:
        """By layer, what the compiler tells it apart by beside its adapters: numbers in the code, not in tensors."""
        windows = [self.windows[kind] for kind in self.body.kinds]
        attentions = [layer.self_attn for layer in self.body.layers]
        rotated = [bool(getattr(attention, "use_rope", True)) for attention in attentions]
        kept = [getattr(attention, "sliding_window", None) for attention in attentions]  # without a row (build.py)
        local = [
            own is not None and getattr(one, "is_sliding", None) for own, one in zip(kept, attentions, strict=True)
        ]
        return list(zip(windows, rotated, kept, local, strict=True))

    def loss_rows(self, tokens: int) -> int:
        """The most supervised ones among a micro batch's `tokens`."""
        return self.loss_bounds.get(tokens, tokens)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, cu_seqlens: Tensor, *, max_seqlen: int = 0
    ) -> Tensor:
        """input_ids, position_ids, document_ids [B, S], cu_seqlens [documents + 1] -> [B, S, D]. `max_seqlen` replaces
        the model's bound on document length, for documents that are not of the run's data."""
        hidden, inputs = self.body_inputs(input_ids, position_ids, document_ids, cu_seqlens)
        return self.body(hidden, inputs, cu_seqlens, max_seqlen or self.max_seqlen)

    def body_inputs(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, tuple[KindInputs, ...]]:
        """What the first layer is given [B, S, D], and what the layers of each kind are given beside it."""
        if self.trained is not None:
            self.trained.write()
        hidden = self.embed(input_ids)
        if self.trained is not None and torch.is_grad_enabled():
            hidden = self.trained.reached_by(hidden, input_ids)
        if self.neftune_alpha and torch.is_grad_enabled():
            hidden = hidden + embedding_noise(hidden, cu_seqlens, self.neftune_alpha)
        if self.embedding_multiplier != 1:
            hidden = hidden * self.embedding_multiplier
        if torch.is_grad_enabled():
            # Below the first layer nothing is trained, or single tokens. Without this, layer 0's input would need no
            # gradient and the other layers' would: two graphs instead of one.
            hidden.requires_grad_()
        masks: dict[int | None, Tensor | None] = {kind.window: None for kind in self.kinds}
        if self.attention in MASKED:
            # Added to the scores. From a boolean mask every layer would make one of these, and keep it.
            same = document_mask(document_ids)
            for window in masks:
                visible = same if window is None else same & within_window(same, window)
                masks[window] = hidden.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        tables = {table: self._rotations(table, position_ids) for table in self._tables}
        return hidden, tuple(
            KindInputs(*tables[kind.table], masks[kind.window], window)
            for kind, window in zip(self.kinds, self.windows, strict=True)
        )

    def _rotations(self, table: str, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] -> cos and sin [B, S, E]."""
        suffix = "" if table == self._tables[0] else f"_{table}"
        return getattr(self, f"cos{suffix}")[position_ids], getattr(self, f"sin{suffix}")[position_ids]

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, document_ids: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """All [B, S] except cu_seqlens; labels are already shifted -> loss summed over supervised tokens, fp32
        scalar."""
        hidden = self.hidden_states(input_ids, position_ids, document_ids, cu_seqlens)
        if self.logits_rule.divisor is not None:  # of the logits: the same as of what the head multiplies
            hidden = hidden / self.logits_rule.divisor
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head.weight,
            labels.flatten(),
            chunk=self.loss_chunk,
            functions=self.loss_functions,
            max_targets=self.loss_rows(labels.numel()),
            trained=None if self.trained is None else TrainedRows(self.trained.ids, self.trained.head_rows),
        )

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Logits [V] of the token after one document, input_ids [1, T]; for the sample after training."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)[None]
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        document_ids = torch.zeros_like(positions, dtype=torch.int32)
        hidden = self.hidden_states(input_ids, positions, document_ids, cu_seqlens, max_seqlen=length)
        return finished_logits(hidden[0, -1] @ self.head.weight.T, self.logits_rule)


def use_native_norm(norm: nn.Module) -> None:
    """Replace the forward of a transformers RMSNorm by torch's kernel, in place; it stays an instance of its class. A
    norm of another form, as Gemma's by 1 + weight, stays as it is.

    For the final norm with compile.scope=layer, where no compiled graph holds it: transformers' version is some eight
    elementwise operations with fp32 results [B, S, D] in between. torch's is one launch each way and rounds once.
    """
    if not hasattr(norm, "variance_epsilon"):
        return
    norm.__class__ = type(f"Native{type(norm).__name__}", (type(norm),), {"forward": _native_norm})


def _native_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """hidden_states [..., D] -> [..., D]."""
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
