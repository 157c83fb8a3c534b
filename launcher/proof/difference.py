"""How far one figure is from another."""

import math


def difference(value: float, base: float) -> float:
    """|value - base| relative to base; 0 where both are equal, infinite where one is NaN or only base is 0."""
    if value == base:
        return 0.0
    relative = abs(value - base) / abs(base) if base else math.inf
    return math.inf if math.isnan(relative) else relative
