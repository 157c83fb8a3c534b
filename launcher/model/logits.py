"""From hidden states to logits, as a model's config says: some divide them, some cap them.

logits = h W^T / divisor, then cap * tanh(logits / cap)          h W^T / divisor = (h / divisor) W^T
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.model.families import stock_setting


class LogitsRule(NamedTuple):
    divisor: float | None  # of Granite
    cap: float | None  # of Gemma 2


def logits_rule(config: Any) -> LogitsRule:
    """`config` is transformers'."""
    divisor = stock_setting(config, "logits_scaling")
    return LogitsRule(None if divisor == 1 else divisor, stock_setting(config, "final_logit_softcapping"))


def logit_bytes(rule: LogitsRule, dtype: torch.dtype) -> int:
    """Bytes that the loss takes for a logit of a chunk: of a capped one there are four fp32 values, its tanh and its
    gradients before and after that among them."""
    return dtype.itemsize if rule.cap is None else 4 * torch.float32.itemsize


def finished_logits(products: Tensor, rule: LogitsRule) -> Tensor:
    """The outputs of the head [..., V] -> the model's logits [..., V]."""
    if rule.divisor is not None:
        products = products / rule.divisor
    return products if rule.cap is None else rule.cap * torch.tanh(products / rule.cap)
