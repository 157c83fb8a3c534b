"""Broken rows never cause a traceback or get lost uncounted"""

import csv
import datetime
import decimal
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.read.rows import Row
from launcher.errors import DataError
from tests.support.reading import read, refusal

GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    "prompt_completion": {"prompt": "1 + 1 = ", "completion": "2"},
    "text": {"text": "A river flows."},
}
ODD: list[Any] = ["", " ", "é漢😀", "\0", "\x1b[31m", "user", "tool", "human", None, True, 0, 10**400, float("nan")]
ODD += [[], {}, [None], ["a", 1], [[]], {"text": {}}, [{"type": "text"}], [{"role": "user"}], [{"from": "gpt"}]]


def replaced(rng: random.Random, whole: Any) -> Any:
    """The same with an odd value somewhere within."""
    if rng.random() < 0.3 or not isinstance(whole, list | dict) or not whole:
        return rng.choice(ODD)
    key = rng.choice(list(whole)) if isinstance(whole, dict) else rng.randrange(len(whole))
    copy: Any = whole.copy()
    copy[key] = replaced(rng, whole[key])
    return copy


def line(rng: random.Random, good: dict[str, Any]) -> bytes:
    """A line of a .jsonl file that is broken in one of many ways, or in none."""
    text = json.dumps(replaced(rng, good), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    match rng.randrange(8):
        case 0:
            text = text[: rng.randrange(len(text) + 1)]
        case 1:
            text = rng.randbytes(rng.randrange(60))
        case 2:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([b"\\ud83d", b"\xff", b"\0", b"9" * 5000, b"{", b'"', b"1e999"]) + text[at:]
        case 3:
            text = b'{"text": ' + rng.choice([b"[", b'{"a":']) * rng.choice([50, 5000, 100_000])
    return text.replace(b"\n", b" ")


def dropped(counts: Counter[str]) -> int:
    return sum(number for key, number in counts.items() if key.startswith("rows_dropped_"))


def audit(written: Sequence[bytes], sentinel: bytes, rows: Sequence[Row], counts: Counter[str]) -> None:
    """Every line that is not blank was read and either given or counted; every sentinel was given."""
    numbers = [int(row.where.rsplit(":", 1)[1]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert counts["rows_read"] == sum(1 for text in written if text.strip(b" \t\r\v\f")) == len(rows) + dropped(counts)
    assert sum(n for key, n in counts.items() if "_key_" not in key) == counts["rows_read"] + dropped(counts)
    assert {number for number, text in enumerate(written, start=1) if text == sentinel} <= set(numbers)


@pytest.mark.parametrize("layout", [*GOOD, "auto"])
def test_ten_thousand_fuzzed_rows_bring_no_traceback_and_are_counted_exactly(tmp_path, layout):
    rng = random.Random(layout)
    good = GOOD.get(layout, GOOD["messages"])
    sentinel = json.dumps(good).encode()
    written = [sentinel] + [sentinel if rng.random() < 0.1 else line(rng, good) for _ in range(1699)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(written))
    rows, counts = read(path, format=layout, bad_rows="skip")
    audit(written, sentinel, rows, counts)
    reasons = {"empty", "wrong_type", "broken_json", "encoding"} | ({"unknown_role"} if "messages" in good else set())
    assert {f"rows_dropped_{reason}" for reason in reasons} <= set(counts), "the fuzz must reach every check"
    for lost in ([*rows[:7], *rows[8:]], rows + rows[-1:]):
        with pytest.raises(AssertionError):
            audit(written, sentinel, lost, counts)
    with pytest.raises(AssertionError):
        audit(written, sentinel, rows, counts - Counter(rows_read=1, rows_dropped_empty=1))


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt"])
def test_a_mutated_file_of_another_kind_is_read_or_refused(tmp_path, suffix):
    rng = random.Random(suffix)
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "completion"], *([f"a {i}", 'say "b",\nthen c'] for i in range(20))])
    contents = {".json": json.dumps([GOOD["text"]] * 20), ".csv": table.getvalue(), ".txt": "a\n\nb\n" * 20}
    whole = contents[suffix].encode()
    path = tmp_path / f"rows{suffix}"
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        raw = bytearray(whole[: rng.randrange(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice([b'"', b"\xff", b"\0", b",", b"\n", b"\\ud83d", b"[", b"7"])
        path.write_bytes(raw)
        try:
            rows, counts = read(path, bad_rows="skip")
        except DataError as error:
            assert error.code == 3
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            outcomes["with faults"] += len(counts) > 1
            assert len(rows) + dropped(counts) == counts["rows_read"]
    assert outcomes["read"] > 50 and outcomes["refused"] + outcomes["with faults"] > 50


STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
NOT_STRINGS: list[tuple[pa.DataType, Any]] = [  # a type and a value of it
    (pa.bool_(), True),
    (pa.float64(), float("nan")),
    (pa.date32(), datetime.date(2020, 1, 1)),
    (pa.date32(), 2**30),  # Python cannot hold this one and the next
    (pa.timestamp("s"), 2**49),
    (pa.timestamp("ns"), 1),
    (pa.decimal256(60, 2), decimal.Decimal("1.50")),
    (pa.binary(), b"\xff"),
    (pa.list_(pa.string()), ["a"]),
    (pa.struct({"a": pa.date32()}), {"a": None}),
    (pa.map_(pa.string(), pa.binary()), [("a", b"b")]),
    (pa.null(), None),
]


COLUMNS = [
    (kind, value, nested)
    for kind, value in [*((kind, "") for kind in STRINGS), *NOT_STRINGS]
    for nested in (False, True)
    if not (nested and kind == pa.string_view())  # pyarrow does not write it nested
]


@pytest.mark.parametrize(("kind", "value", "nested"), COLUMNS, ids=str)
def test_a_parquet_column_of_any_type_is_read_and_counted_exactly(tmp_path, kind, value, nested):
    path = tmp_path / "rows.parquet"
    is_text = kind in STRINGS
    cells = ["a river", value, None] * 20
    column = pa.array(cells, pa.string()).cast(kind) if is_text else pa.array(cells[1:2] * 40 + [None] * 20, kind)
    if nested:
        message = pa.StructArray.from_arrays([pa.array(["assistant"] * 60), column], ["role", "content"])
        column = pa.ListArray.from_arrays(pa.array(range(61), pa.int32()), message)
    pq.write_table(pa.table({"messages" if nested else "text": column}), path, row_group_size=25)
    rows, counts = read(path, bad_rows="skip")
    if not is_text:
        expected = {"rows_dropped_wrong_type": 60}
    elif nested:  # a message may be empty
        expected = {"rows_dropped_wrong_type": 20}
    else:
        expected = {"rows_dropped_wrong_type": 20, "rows_dropped_empty": 20}
    assert counts == {"rows_read": 60, **expected} and len(rows) == 60 - sum(expected.values())
    assert " row " in refusal(path, streaming=True)
