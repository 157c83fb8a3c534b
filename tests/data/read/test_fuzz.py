"""No row, however broken, brings a traceback, and none is lost; what is well written is read back as it was."""

import csv
import datetime
import decimal
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import ROLES, Conversation, Message, Row, RowFault, Text
from launcher.data.read.sources import open_source
from launcher.errors import DataError
from launcher.recipe.data_section import Source

GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    "prompt_completion": {"prompt": "1 + 1 = ", "completion": "2"},
    "text": {"text": "A river flows."},
}
ODD = ["", " ", "é漢😀", "\0", "\x1b[31m", "user", "tool", "human", None, True, 0, -1.5, 10**400, float("nan"), [], {}]
KEYS = [
    "role",
    "content",
    "from",
    "value",
    "text",
    "type",
    "tool_calls",
    *(key for row in GOOD.values() for key in row),
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    if depth > 3 or rng.random() < 0.5:
        return rng.choice(ODD)
    if rng.random() < 0.5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def replaced(rng: random.Random, whole: Any) -> Any:
    """The same with another value somewhere within."""
    if rng.random() < 0.3 or not isinstance(whole, list | dict) or not whole:
        return value(rng)
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


def read(path: Path, layout: str) -> tuple[list[Row], Counter[str]]:
    counts: Counter[str] = Counter()
    [feed] = open_source(Source.model_validate({"path": str(path), "format": layout}), streaming=False)
    return list(read_rows(feed, bad_rows="skip", counts=counts)), counts


def audit(written: Sequence[bytes], sentinel: bytes, rows: Sequence[Row], counts: Counter[str]) -> None:
    """Every line that is not blank was read, and was either given or counted; every sentinel was given."""
    numbers = [int(row.where.rsplit(":", 1)[1]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert counts["rows_read"] == sum(1 for text in written if text.strip(b" \t\r\v\f"))
    dropped = sum(n for key, n in counts.items() if key.startswith("rows_dropped_"))
    assert set(counts) - {"rows_read"} == {key for key in counts if key.startswith("rows_dropped_")}
    assert len(rows) + dropped == counts["rows_read"]
    assert {number for number, text in enumerate(written, start=1) if text == sentinel} <= set(numbers)


@pytest.mark.parametrize("layout", [*GOOD, "auto"])
def test_ten_thousand_fuzzed_rows_bring_no_traceback_and_are_counted_exactly(tmp_path: Path, layout: str) -> None:
    rng = random.Random(layout)
    good = GOOD.get(layout, GOOD["messages"])
    sentinel = json.dumps(good).encode()
    written = [sentinel] + [sentinel if rng.random() < 0.1 else line(rng, good) for _ in range(1699)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(written))
    rows, counts = read(path, layout)
    audit(written, sentinel, rows, counts)
    reasons = {"empty", "wrong_type", "broken_json", "encoding"} | ({"unknown_role"} if "messages" in good else set())
    assert {f"rows_dropped_{reason}" for reason in reasons} <= set(counts), "the fuzz must reach every check"
    for lost in ([*rows[:7], *rows[8:]], rows + rows[-1:]):
        with pytest.raises(AssertionError):
            audit(written, sentinel, lost, counts)
    with pytest.raises(AssertionError):
        audit(written, sentinel, rows, counts - Counter(rows_read=1, rows_dropped_empty=1))


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt"])
def test_a_mutated_file_of_another_kind_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "completion"], *([f"a {i}", 'say "b",\nthen c'] for i in range(20))])
    whole = {".json": json.dumps([GOOD["text"]] * 20), ".csv": table.getvalue(), ".txt": "a\n\nb\n" * 20}[
        suffix
    ].encode()
    path = tmp_path / f"rows{suffix}"
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        raw = bytearray(whole[: rng.randrange(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice([b'"', b"\xff", b"\0", b",", b"\n", b"\\ud83d", b"[", b"7"])
        path.write_bytes(raw)
        try:
            rows, counts = read(path, "auto")
        except DataError as error:
            assert error.code == 3
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            outcomes["with faults"] += len(counts) > 1
            dropped = sum(n for key, n in counts.items() if key.startswith("rows_dropped_"))
            assert len(rows) + dropped == counts["rows_read"]
    assert outcomes["read"] > 50 and outcomes["refused"] + outcomes["with faults"] > 50


STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
TYPED: list[tuple[pa.DataType, Any]] = [  # what is no string, and a value of it
    (pa.bool_(), True),
    (pa.int8(), -1),
    (pa.uint64(), 2**64 - 1),
    (pa.float16(), 1.5),
    (pa.float64(), float("nan")),
    (pa.date32(), datetime.date(2020, 1, 1)),
    (pa.date64(), datetime.date(2020, 1, 1)),
    (pa.time32("s"), datetime.time(1)),
    (pa.time64("ns"), datetime.time(1)),
    (pa.timestamp("s"), 0),
    (pa.timestamp("s"), 2**49),  # beyond what Python holds, as the next
    (pa.date32(), 2**30),
    (pa.timestamp("ns"), 1),
    (pa.timestamp("us", tz="UTC"), 0),
    (pa.duration("us"), 1),
    (pa.decimal128(9, 2), decimal.Decimal("1.50")),
    (pa.decimal256(60, 2), decimal.Decimal("1.50")),
    (pa.binary(), b"\xff"),
    (pa.large_binary(), b"text"),
    (pa.binary(2), b"ab"),
    (pa.list_(pa.string()), ["a"]),
    (pa.list_(pa.binary(), 1), [b"a"]),
    (pa.struct({"a": pa.date32()}), {"a": None}),
    (pa.map_(pa.string(), pa.binary()), [("a", b"b")]),
    (pa.null(), None),
]


CASES = [(kind, value, nested) for nested in (False, True) for kind, value in [*((s, None) for s in STRINGS), *TYPED]]
CASES.remove((pa.string_view(), None, True))  # which pyarrow does not write


@pytest.mark.parametrize(("kind", "value", "nested"), CASES, ids=lambda it: str(it).replace(" ", ""))
def test_a_parquet_file_of_any_type_is_read_and_counted_exactly(
    tmp_path: Path, kind: pa.DataType, value: Any, nested: bool
) -> None:
    rng = random.Random(f"{kind} {value} {nested}")
    good, path = kind in STRINGS, tmp_path / "rows.parquet"
    cells = [rng.choice(["a river", "", None] if good else [value, value, None]) for _ in range(60)]
    column = pa.array(cells, pa.string()).cast(kind) if good else pa.array(cells, kind)
    if nested:
        roles = pa.array(["assistant"] * 60)
        message = pa.StructArray.from_arrays([roles, column], ["role", "content"])
        column = pa.ListArray.from_arrays(pa.array(range(61), pa.int32()), message)
    pq.write_table(pa.table({"messages" if nested else "text": column}), path, row_group_size=25)
    rows, counts = read(path, "auto")
    nothing = 0 if nested else cells.count("")  # a message may be empty
    found = counts.pop("rows_dropped_empty", 0), counts.pop("rows_dropped_wrong_type", 0), counts.pop("rows_read")
    expected = sum(cell is not None for cell in cells) - nothing if good else 0
    assert found == (nothing, 60 - expected - nothing, 60) and len(rows) == expected and not counts
    with pytest.raises(RowFault, match=r"row \d+: "):
        [feed] = open_source(Source(path=str(path)), streaming=True)
        list(read_rows(feed, bad_rows="raise", counts=Counter()))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)  # a .csv file holds no zero byte
filled = texts.filter(str.strip)
chats = st.lists(st.builds(Message, st.sampled_from(ROLES), texts), min_size=1, max_size=4)
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def as_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def as_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"from": SPEAKERS[message.role], "value": message.content} for message in messages]


WRITTEN: dict[str, st.SearchStrategy[tuple[dict[str, Any], Any, int | None]]] = {  # a row, what it holds, its answer
    "messages": chats.map(lambda m: ({"messages": as_objects(m)}, m, None)),
    "sharegpt": chats.map(lambda m: ({"conversations": as_turns(m)}, m, None)),
    "alpaca": st.tuples(filled, filled, filled).map(
        lambda t: (
            dict(zip(("instruction", "input", "output"), t, strict=True)),
            [Message("user", f"{t[0]}\n\n{t[1]}"), Message("assistant", t[2])],
            1,
        )
    ),
    "prompt_completion": st.tuples(texts, filled).map(
        lambda t: ({"prompt": t[0], "completion": t[1]}, "".join(t), len(t[0]))
    ),
    "text": filled.map(lambda t: ({"text": t}, t, None)),
}


CELLS = ["alpaca", "prompt_completion", "text"]  # the formats whose columns a .csv file can hold


@pytest.mark.parametrize(
    ("layout", "suffix"), [*((f, s) for f in WRITTEN for s in (".jsonl", ".json")), *((f, ".csv") for f in CELLS)]
)
def test_what_is_written_in_a_format_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, layout: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("written") / f"rows{suffix}"

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(WRITTEN[layout], min_size=1, max_size=4), st.booleans())
    def check(written: list[tuple[dict[str, Any], Any, int | None]], ascii_only: bool) -> None:
        rows = [row for row, _, _ in written]
        if suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as stream:
                table = csv.DictWriter(stream, rows[0], quoting=csv.QUOTE_ALL)
                table.writeheader()
                table.writerows(rows)
        elif suffix == ".json":
            path.write_text(json.dumps(rows, ensure_ascii=ascii_only), encoding="utf-8", newline="")
        else:
            lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
            path.write_text(lines, encoding="utf-8", newline="")
        got, counts = read(path, "auto")
        assert counts == {"rows_read": len(rows)}
        for row, (_, held, answer) in zip(got, written, strict=True):
            assert row.answer == answer
            if isinstance(row, Text):
                assert row.text == held
            else:
                assert isinstance(row, Conversation) and list(row.messages) == held

    check()
