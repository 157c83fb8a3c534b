"""The arithmetic that a training step needs, counted from the model's shapes, for its share of the matmul ceiling.

A product of [m, k] and [k, n] is 2mkn FLOPs: m*k*n multiplications and as many additions. So, for one token:

    frozen linear [in, out]     forward 2*in*out, gradient of its input 2*in*out; its weight has no gradient
    LoRA A [in, r], B [r, out]  forward 2*r*(in + out), gradients of inputs and of weights as much again each
    head [D, V]                 as a frozen linear, but of a supervised token: the others have no loss

and for each pair of a position and one that it sees (itself and those before it in its document), in each layer, with
E = heads * width of a head:

    attention                   scores 2*E, weighted values 2*E; backward the two gradients of each: 8*E

A document of L tokens has L * (L + 1) / 2 pairs. Not counted: what is computed again (checkpointing, flash attention's
backward), what padding and masked pairs cost, dequantisation and everything elementwise; so a share of the ceiling says
how much of the device's time is the arithmetic nobody can leave out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.recipe.schema import LoraSection


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward."""

    per_token: int
    per_target: int  # a supervised token, on top
    per_pair: int  # a position and one that it sees

    def of(self, lengths: Iterable[int], *, targets: int) -> int:
        """Of documents of these lengths, in tokens, `targets` of which are supervised."""
        sizes = list(lengths)
        pairs = sum(n * (n + 1) // 2 for n in sizes)
        return self.per_token * sum(sizes) + self.per_target * targets + self.per_pair * pairs


def model_flops(config: Any, lora: LoraSection) -> ModelFlops:
    """Of the model that `config` describes, with adapters of rank `lora.r` on the linears named in `lora.targets`."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = skeleton.get_output_embeddings()
    per_token, per_target = 0, 2 * 2 * head.in_features * head.out_features
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            per_token += 2 * 2 * module.in_features * module.out_features
            if name.rsplit(".", 1)[-1] in lora.targets:
                per_token += 3 * 2 * lora.r * (module.in_features + module.out_features)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return ModelFlops(per_token, per_target, 3 * 2 * 2 * width * config.num_hidden_layers)
