"""Token ids prepared elsewhere: a row's lists of numbers become TokenIds, checked and otherwise as they are.

input_ids        5  6  7  8  0        int, from 0
attention_mask   1  1  1  1  0        may be missing; 0: padding, trimmed at both ends
labels        -100  6 -100 8 -100     may be missing; the id itself (learned) or -100 (not)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.read.rows import RowFault, TokenIds, shown_under, shown_value

IGNORED_LABEL = -100  # as in torch's cross_entropy
MAX_ID = 2**31 - 1
Integers = NDArray[np.int64]


def parse_token_ids(fields: dict[str, Any], where: str) -> TokenIds | None:
    """None for a row without tokens. Raises RowFault for lists that do not fit each other, or what is no id."""
    ids = _integers(fields, "input_ids", where)
    labels = _beside(ids, fields, "labels", where)
    mask = _beside(ids, fields, "attention_mask", where)
    if mask is not None:
        kept = np.flatnonzero(mask)
        first, last = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
        if not np.all(mask[first:last] == 1):
            at = first + int(np.argmax(mask[first:last] != 1))
            raise _fault(where, "attention_mask is 1, or 0 for padding at an end.", f"{mask[at]} at place {at}")
        ids, labels = ids[first:last], None if labels is None else labels[first:last]
    if len(wrong := np.flatnonzero((ids < 0) | (ids > MAX_ID))):
        raise _fault(where, "input_ids are whole numbers from 0.", f"{ids[wrong[0]]} at place {wrong[0]}")
    if labels is not None and len(wrong := np.flatnonzero((labels != ids) & (labels != IGNORED_LABEL))):
        at = int(wrong[0])
        rule = "a label is the id at its place, or -100 where nothing is learned (not the id after it)."
        raise _fault(where, rule, f"{labels[at]} beside the id {ids[at]} at place {at}")
    supervised = None if labels is None else labels != IGNORED_LABEL
    return TokenIds(ids.astype(np.int32), supervised, where) if len(ids) else None


def _integers(fields: dict[str, Any], column: str, where: str) -> Integers:
    values = fields.get(column)
    if not isinstance(values, list):
        raise _fault(where, f'"{column}" is a list of whole numbers.', shown_under(column, fields))
    odd = next((value for value in values if not isinstance(value, int) or isinstance(value, bool)), None)
    if odd is not None or None in values:
        raise _fault(where, f'"{column}" is a list of whole numbers.', f"a list with {shown_value(odd)}")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise _fault(where, f'"{column}" is a list of whole numbers.', "a number of more than 64 bits") from None


def _beside(ids: Integers, fields: dict[str, Any], column: str, where: str) -> Integers | None:
    if fields.get(column) is None:
        return None
    values = _integers(fields, column, where)
    if len(values) != len(ids):
        found = f"{len(values):,} numbers beside {len(ids):,}"
        raise _fault(where, f'"{column}" has a number for each of "input_ids".', found)
    return values


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("token_ids", where=where, rule=rule, found=found)
