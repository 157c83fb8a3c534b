"""A greedy answer of the trained model to one validation prompt, so that a person can judge the run at a glance."""

from collections.abc import Collection
from typing import Any

import torch

from launcher.data.example import Example
from launcher.model.packed import PackedCausalLM
from launcher.records.run import Sample


def generate(
    packed: PackedCausalLM,
    tokenizer: Any,
    example: Example,
    *,
    tokens: int,
    max_length: int,
    stop_ids: Collection[int],
) -> Sample:
    """Up to `tokens` greedy tokens without a cache: a few dozen short forwards, uncompiled, so that none recompiles.

    A longer prompt keeps its last `max_length - tokens` tokens. `stop_ids`: the answer ends before one of these.
    """
    device = packed.cos.device
    max_tokens = min(tokens, max_length // 2)
    ids = example.prompt_ids[-(max_length - max_tokens) :]
    prompt_length = len(ids)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(max_tokens):
            logits = packed.next_logits(torch.tensor([ids], device=device))
            token = int(logits.argmax())
            if token in stop_ids:
                break
            ids = [*ids, token]
    text = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True).strip()
    return Sample(prompt=example.prompt, expected=example.expected, generated=text)
