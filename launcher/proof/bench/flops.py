"""The arithmetic that a training step needs, counted from the model's shapes, for its share of the matmul ceiling.

A product of [m, k] and [k, n] is 2mkn FLOPs: m*k*n multiplications and as many additions. For one token that gives

    frozen linear [in, out]     forward 2*in*out, gradient of its input 2*in*out; its weight has no gradient
    LoRA A [in, r], B [r, out]  forward 2*r*(in + out), gradients of inputs and of weights the same again each
    head [D, V]                 as a frozen linear, for supervised tokens only: the others have no loss

and in each layer, for each pair of a position and one it attends to, with E = heads * head width:

    attention                   scores 2*E, weighted values 2*E; backward twice as much for each: 8*E

A document of L tokens has L * (L + 1) / 2 pairs: a position attends to itself and those before it. Not counted is what
an implementation may avoid: recomputation (checkpointing, flash attention's backward), padding, masked pairs,
dequantisation and elementwise work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.model.targets import fitted_targets
from launcher.recipe.schema import LoraSection


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward."""

    per_token: int
    per_target: int  # more, for a supervised token
    per_pair: int  # of a position and one it attends to

    def of(self, lengths: Sequence[int], *, targets: int) -> int:
        """FLOPs of documents of these lengths, in tokens, `targets` of which are supervised."""
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return self.per_token * sum(lengths) + self.per_target * targets + self.per_pair * pairs


def model_flops(config: Any, lora: LoraSection) -> ModelFlops:
    """Count for the model of `config` with adapters of rank `lora.r` on the linears named in `lora.targets`."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = skeleton.get_output_embeddings()
    targets = fitted_targets(skeleton, lora.targets)
    per_token, per_target = 0, 2 * 2 * head.in_features * head.out_features
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            per_token += 2 * 2 * module.in_features * module.out_features
            if name.rsplit(".", 1)[-1] in targets:
                per_token += 3 * 2 * lora.r * (module.in_features + module.out_features)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return ModelFlops(per_token, per_target, 3 * 2 * 2 * width * config.num_hidden_layers)
