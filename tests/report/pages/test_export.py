"""The page of an export: what was written, and which figure is beyond its limit."""

from dataclasses import replace

from launcher.records.answers import Answer, Answered
from launcher.records.export import ExportFigures, ExportLimits, ExportRecord, GreedyPair
from launcher.records.run import Verdict
from tests.support.records import ESCAPED, HOSTILE, section, shown

FIGURES = ExportFigures(
    documents=64, tokens=1543, positions=1000, trained_loss=1.5, written_loss=1.51, largest_logit_difference=0.2,
    mean_logit_difference=0.01, mean_kl=2e-5, largest_kl=1e-3, agreement=0.995, disagreement=0.001,
)  # fmt: skip
RECORD = ExportRecord(
    run="runs/a/adapter", base="owner/base", folder="/out", format="merged", on="dequantised", dtype="bfloat16",
    trained_dtype="float32", device="CPU", files={"model.safetensors": 5 * 2**20, "config.json": 100},
    data="64 documents of validation", limits=ExportLimits(loss=0.1, kl=1e-3, disagreement=0.02), figures=FIGURES,
    answers=(GreedyPair("What is it?", "a bird", "a fish", 3, 1, (True, False)),), stop_tokens=("<|end|>",),
    peak_mib=512, elapsed_s={"write": 1.0}, verdicts=(Verdict("the loss is the trained model's", True, "near"),),
    notes=("a note",),
)  # fmt: skip


def test_a_proved_export_shows_its_figures_beside_their_limits_and_how_to_load_it() -> None:
    text = shown(RECORD)
    table = section(text, "The written model beside the trained one")
    assert "difference of the losses 1.0e-02 0.1" in table and "another, by more than a tie 0.0010 0.02" in table
    assert "What is it? a bird a fish 1 of 3 one" in section(text, "Greedy answers")
    assert "5 MiB in 2 files, bfloat16" in text and 'AutoModelForCausalLM.from_pretrained("/out")' in text
    assert "AutoPeftModelForCausalLM" in shown(replace(RECORD, format="adapter", on=""))


def test_an_export_that_is_not_proved_says_where_it_lies_and_not_how_to_load_it() -> None:
    record = replace(
        RECORD, verdicts=(Verdict("the loss is the trained model's", False, "far"),), folder="/out.unproven"
    )
    text = shown(record)
    assert "kept aside" in text and "from_pretrained" not in text and "FAIL" in text
    assert record.failure.splitlines()[1] == "the loss is the trained model's: far"
    report = record.as_report()
    assert (report["mode"], report["holds"], round(report["figures"]["loss_difference"], 9)) == ("export", False, 0.01)


def test_an_answer_is_shown_with_the_bases_and_the_datas_own_and_its_controls_escaped() -> None:
    answered = Answered("Say it.", Answer(HOSTILE, 10, 2.0, False), Answer("base", 4, 1.0, True), expected="it")
    text = shown(answered)
    assert ESCAPED.split("\\x9b")[0] in text and "10 tokens, 5 tokens/s; cut by max_tokens" in text
    words = [line.split()[0] for line in text.splitlines()[2:]]
    assert words[0] == "expected" and words.index("trained") < words.index("10") < words.index("base") < words.index(
        "4"
    )
    assert "answer" in shown(replace(answered, base=None)) and "base" not in shown(replace(answered, base=None))
