"""mode=parity on the console: figures, what broke the gate, and plain text."""

import io
from dataclasses import replace
from typing import Any

from launcher.records.parity import AdapterParity, Gate, Pair, ParityBatch, ParityRecord
from launcher.records.run import CompileRecord, StartRecord, Verdict
from launcher.report import make_console, parity_page

GATE = Gate(loss=2e-3, cosine=0.995, error_ratio=1.2, error_floor=0.0, eager_error=0.3, loss_batches=16)
START = StartRecord(
    recipe="own [bold]", model="/models/base", family="llama", parameters=1_000, trainable=10, device="CPU",
    world_size=1, dtype="bfloat16", quantization="nf4", attention="sdpa (as asked)", micro_batch=2, widths=(64, 128),
    accumulation=3, steps=2, optimizer="adamw", compile="strict, scope layer, inductor", batching="bucketed",
    streamed=False, template="llama3", loss_on={}, train_rows=9, train_blocks=9, validation_rows=0, fill=1.0,
    epochs=1.0, run_dir="", notes=("a \x1b[31mnote",),
)  # fmt: skip
COMPILE = CompileRecord(4, 4, 4, 0, 0, 0, 1.0, 1.0, 0, "abc")


def batch(number: int, *, difference: float = 1e-4, cosine: float = 0.99999) -> ParityBatch:
    return ParityBatch(number, 1_234, Pair(2.5, 2.6), 2.75, difference, cosine, Pair(1e-3, 2e-3), Pair(0.01, 0.02))


def adapter(kind: str, matrix: str, cosine: float) -> AdapterParity:
    return AdapterParity(kind, matrix, 16, cosine, "layer 3, batch 2", 4e-3, 0.98)


def record(**changes: Any) -> ParityRecord:
    made = ParityRecord(
        recipe={}, start=START, compile=COMPILE, gate=GATE, batches=(batch(1), batch(2)),
        adapters=(adapter("q", "A", 0.999999), adapter("k", "B", 0.9987)), loss_error=Pair(1e-3, 2e-3),
        gradient_error=Pair(0.011, 0.010), verdicts=(Verdict("loss", True, "small"),), elapsed_s={"eager": 2.0},
        notes=("measured with lora.dropout=0",),
    )  # fmt: skip
    return replace(made, **changes)


def page(shown: ParityRecord) -> str:
    stream = io.StringIO()
    parity_page(make_console(stream), shown)
    return stream.getvalue()


def rows(text: str, heading: str) -> list[list[str]]:
    return [line.split() for line in text[text.index(f"─ {heading}") :].split("\n─ ")[0].splitlines()]


def test_each_batch_and_each_adapter_kind_has_its_row() -> None:
    text = page(record())
    found = [" ".join(row) for name in ("Batches", "Adapter", "Error against") for row in rows(text, name)]
    assert "1 1,234 2.5000 2.6000 2.7500 1.0e-04 0.99999 1.0e-03 2.0e-03 1.0e-02 2.0e-02" in found
    assert "q A 16 1.00000 layer 3, batch 2 4.0e-03 0.98000" in found
    assert "k B 16 0.99870 layer 3, batch 2 4.0e-03 0.98000" in found
    assert "gradient, all adapters 1.10e-02 1.00e-02 1.10" in found


def test_the_head_says_what_was_compared_and_that_nothing_was_updated() -> None:
    text = page(record())
    assert "parity of recipe own [bold]" in text
    assert "autocast to bfloat16" in text and "autocast" not in page(record(start=replace(START, dtype="float32")))
    assert "2 of 2 × 64, 128 × accumulation 3" in text
    assert "the weights are not updated between batches" in text
    assert "measured with lora.dropout=0" in text
    assert "\x1b" not in text and "\\x1b[31mnote" in text


def test_of_many_batches_a_sample_is_shown_with_the_first_and_the_last() -> None:
    text = page(record(batches=tuple(batch(n) for n in range(1, 101))))
    numbers = [row[0] for row in rows(text, "Batches") if row and row[0].isdigit()]
    assert len(numbers) == 16 and (numbers[0], numbers[-1]) == ("1", "100")
    assert "16 of 100 batches" in text


def test_a_closed_gate_is_said_in_at_most_five_lines_and_in_the_json() -> None:
    broken = tuple(Verdict(f"claim {n}", n == 0, "figures") for n in range(5))
    closed = record(verdicts=broken)
    assert not closed.holds and record().holds
    assert len(closed.failure.splitlines()) <= 5
    assert "claim 1: figures" in closed.failure and "claim 0" not in closed.failure
    assert "✗ FAIL" in page(closed) and "✗ FAIL" not in page(record())
    report = closed.as_report()
    assert (report["mode"], report["holds"]) == ("parity", False)
    assert report["batches"][0]["loss"] == {"compiled": 2.5, "eager": 2.6}
