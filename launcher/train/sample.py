"""One greedy answer of the trained model to a validation prompt, so that a person can judge the run at a glance."""

from typing import Any

import torch

from launcher.data.example import Example
from launcher.model.packed import PackedCausalLM
from launcher.records.run import Sample


def generate(packed: PackedCausalLM, tokenizer: Any, example: Example, *, tokens: int, max_length: int) -> Sample:
    """Up to `tokens` greedy tokens, without a cache: a few dozen short forwards, uncompiled so that nothing recompiles.

    The prompt keeps its last `max_length - tokens` tokens where it is longer.
    """
    device = packed.cos.device
    room = min(tokens, max_length // 2)
    ids = example.prompt_ids[-(max_length - room) :]
    start, ends = len(ids), {tokenizer.eos_token_id}
    with torch.compiler.set_stance("force_eager"):
        for _ in range(room):
            logits = packed.next_logits(torch.tensor([ids], device=device))
            token = int(logits.argmax())
            if token in ends:
                break
            ids = [*ids, token]
    text = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    return Sample(prompt=example.prompt, expected=example.expected, generated=text)
