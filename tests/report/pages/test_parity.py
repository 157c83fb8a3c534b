"""mode=parity as a page: what was compared, figures by batch and adapter, what broke the gate."""

from dataclasses import replace

from tests.support.records import bad, parity_batch, parity_record, section, shown


def test_each_batch_and_each_adapter_kind_has_its_row() -> None:
    text = shown(parity_record())
    row = "1 1,234 2.5000 2.6000 2.7500 1.0e-04 0.99999 1.0e-03 2.0e-03 1.0e-02 2.0e-02"
    assert row in section(text, "Batches")
    assert "q A 16 1.00000 layer 3, batch 2 4.0e-03 1.0010 0.9990 1.0e-02 0.98000" in section(text, "Adapter gradients")
    assert "k B 16 0.99870 layer 3, batch 2 4.0e-03 1.0090 0.9990 1.0e-02 0.98000" in section(text, "Adapter gradients")
    assert "gradient, all adapters 1.10e-02 1.00e-02 1.10" in section(text, "Error against fp32")
    assert "eager 2.0 100 % " in section(text, "Elapsed")[3]
    assert section(text, "Notes")[1] == "measured with lora.dropout=0"
    assert section(text, "Verdicts")[1] == "✓ PASS loss small"


def test_the_head_says_what_was_compared_and_that_nothing_was_updated() -> None:
    record = parity_record()
    text = shown(record)
    assert "parity of recipe own [bold]" in text and "bitsandbytes, autocast to bfloat16" in text
    assert "autocast" not in shown(parity_record(start=replace(record.start, dtype="float32")))
    assert "2 of 2 × 64, 128 × accumulation 4" in text and "3 graphs of 3 planned" in text
    assert "the weights are not updated between batches" in text


def test_of_many_batches_a_sample_is_shown_with_the_first_and_the_last() -> None:
    lines = section(shown(parity_record(batches=tuple(map(parity_batch, range(1, 101))))), "Batches")
    numbers = [line.split(" ")[0] for line in lines if " 1,234 " in line]
    assert len(numbers) == 16 and (numbers[0], numbers[-1]) == ("1", "100")
    assert "16 of" not in shown(parity_record()) and ", 16 of 100 batches" in lines[0]


def test_figures_that_close_the_gate_are_shown_as_bad() -> None:
    batches = (parity_batch(1), replace(parity_batch(2), loss_difference=2.1e-3, least_cosine=0.9949, holds=False))
    adapters = (replace(parity_record().adapters[0], least_cosine=0.9948, holds=False), parity_record().adapters[1])
    lengths = (parity_record().lengths[0], replace(parity_record().lengths[1], compiled=0.989))
    closed = parity_record(batches=batches, adapters=adapters, lengths=lengths)
    assert bad(closed) == ["2.1e-03", "0.99490", "0.99480", "0.9890"]
    assert bad(parity_record()) == []
    by_fp32 = replace(parity_record().adapters[0], least_cosine=0.9948)  # below the least cosine, as near as eager
    assert bad(parity_record(adapters=(by_fp32, parity_record().adapters[1]))) == []
