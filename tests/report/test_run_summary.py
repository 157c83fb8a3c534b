"""The console: what a person or a log file sees of a run. Rendered into strings; nothing of torch is needed."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from launcher.records.run import (
    CompileRecord,
    EvalRecord,
    RankRecord,
    RunRecord,
    Sample,
    StartRecord,
    StepRecord,
    Verdict,
    VramRecord,
)
from launcher.report import Progress, error, make_console, start_panel, summary

GPU = "NVIDIA H200"
PHASES = ("before load", "after load", "after adapters", "after compile", "after training")
REASON = "Dynamo cannot trace [bold]print[/bold] of builtins[0], user line model.py:12 [/]"


def start_record(**changes: Any) -> StartRecord:
    record = StartRecord(
        recipe="llama1b", model="unsloth/Llama-3.2-1B-Instruct", family="llama", parameters=1_247_086_592,
        trainable=11_272_192, device=GPU, world_size=2, dtype="bfloat16", quantization="nf4, double quantised",
        attention="varlen: native kernel, one call for all documents of a block", micro_batch=2, widths=(2048,),
        accumulation=4, steps=100, epochs=6.4, optimizer="adamw (fused)", compile="strict, scope layer, inductor",
        batching="packed", streamed=False, template="the tokenizer's own", loss_on={"assistant": 3412},
        train_rows=3412, train_blocks=251, validation_rows=180, fill=0.973, run_dir="runs/llama1b-20260301-120000",
        notes=("dtype auto: bfloat16, compute capability 9.0",), cuda_graphs="on",
    )  # fmt: skip
    return replace(record, **changes)


def step_record(step: int, **changes: Any) -> StepRecord:
    record = StepRecord(
        step=step, loss=2.5 / (1 + step / 20), lr=2e-4, grad_norm=0.731, tokens=31_871, supervised_tokens=9_120,
        step_s=0.4231, vram_mib=7_491.3,
    )  # fmt: skip
    return replace(record, **changes)


def rank_record(rank: int, *, device: str = GPU, peak_mib: float = 7_491.2, **compile_changes: Any) -> RankRecord:
    compiled = CompileRecord(
        planned_graphs=3, expected_graphs=3, compilations=6, graph_breaks=0, recompiles=0, limit_hits=0,
        forward_s=12.34, backward_s=20.15, cache_hits=2, graph_hash="9f86d081884c7d659a2feaa0c55ad015",
        graphs_by_region={"layer": 2, "loss": 1},
    )  # fmt: skip
    vram = tuple(VramRecord(phase, 1_000.0 * i, 1_200.0 * i, peak_mib, 143_771.0) for i, phase in enumerate(PHASES))
    return RankRecord(
        rank=rank, device=device, compile=replace(compiled, **compile_changes), vram=vram, vram_before_mib=1_871.4,
        vram_after_mib=1_902.8, vram_peak_mib=peak_mib, tokens_per_s=75_312.4, supervised_tokens_per_s=21_544.0,
        step_ms_median=423.1, step_ms_p90=431.9,
    )  # fmt: skip


def run_record(*ranks: RankRecord, steps: int = 8, **changes: Any) -> RunRecord:
    record = RunRecord(
        recipe={}, start=start_record(), steps=tuple(step_record(n) for n in range(1, steps + 1)),
        evals=(EvalRecord(0, 2.9134), EvalRecord(steps, 1.4711)),
        elapsed_s={"data": 3.21, "load": 14.9, "compile": 41.0, "train": 102.7, "save": 0.8},
        ranks=ranks or (rank_record(0),), verdicts=(Verdict("no graph break", True, "0 breaks on 1 rank"),),
        sample=Sample("define [green]lexicon[/]", "a list of words", "a book of words"),
    )  # fmt: skip
    return replace(record, **changes)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(run: RunRecord, *, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    summary(console, run)
    return printed(console)


def section(text: str, title: str) -> str:
    """The part of a summary from the line that holds the title to the next rule line."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"─ {title}"))
    last = next((i for i in range(first + 1, len(lines)) if lines[i].startswith("─ ")), len(lines))
    return "\n".join(lines[first:last])


def rank_rows(text: str) -> list[str]:
    return re.findall(r"^\s+\d+ .*9f86d081.*$", section(text, "Ranks"), re.M)


def test_the_rank_table_has_one_row_per_rank_and_min_and_max_only_for_more_than_one() -> None:
    for count in (1, 2, 5):
        text = shown(run_record(*(rank_record(rank) for rank in range(count))))
        assert len(rank_rows(text)) == count
        assert bool(re.search(r"^\s+min ", text, re.M)) is bool(re.search(r"^\s+max ", text, re.M)) is (count > 1)


def test_min_and_max_hold_the_extremes_of_their_column() -> None:
    text = section(shown(run_record(rank_record(0, peak_mib=5_111), rank_record(1, peak_mib=9_222))), "Ranks")
    low, high = (re.search(rf"^\s+{word} .*$", text, re.M) for word in ("min", "max"))
    assert re.search(r"^ +─+ *\n +min ", text, re.M), "a line keeps them apart from the ranks"
    assert low and "5,111" in low[0] and "9,222" not in low[0]
    assert high and "9,222" in high[0] and "5,111" not in high[0]


@pytest.mark.parametrize(
    ("field", "column", "value"),
    [
        ("graph_hash", "graph hash", "3b1effffffffffffffffffffffffffff"),
        ("planned_graphs", "planned graphs", 7),
        ("graph_breaks", "breaks", 7),
        ("recompiles", "recompiles", 7),
    ],
)
@pytest.mark.parametrize("width", [80, 120])
def test_ranks_that_differ_are_named_with_every_ranks_value(field: str, column: str, value: Any, width: int) -> None:
    ranks = (rank_record(0), rank_record(1, **{field: value}), rank_record(2))
    text = shown(run_record(*ranks), width=width)
    assert f"RANKS DIFFER: {column}" in text and text.count("RANKS DIFFER") == 1
    block = text.split("RANKS DIFFER")[1]
    for rank, expected in enumerate((getattr(ranks[0].compile, field), value, getattr(ranks[0].compile, field))):
        assert re.search(rf"^\s+rank {rank}\s+{expected}\s*$", block, re.M)


def test_equal_ranks_and_figures_that_may_differ_are_not_shouted_about() -> None:
    text = shown(run_record(rank_record(0, forward_s=1.0), rank_record(1, forward_s=9.0, cache_hits=0)))
    assert "DIFFER" not in text


def test_a_failed_verdict_reads_fail_and_a_held_one_pass() -> None:
    verdicts = (Verdict("no graph break", True, "0 breaks"), Verdict("no recompile", False, "2 recompiles on rank 1"))
    text = section(shown(run_record(verdicts=verdicts)), "Verdicts")
    assert re.search(r"PASS\s+no graph break\s+0 breaks", text)
    assert re.search(r"FAIL\s+no recompile\s+2 recompiles on rank 1", text)
    assert text.count("PASS") == text.count("FAIL") == 1 and "1 of 2" in text


def test_reasons_survive_verbatim_and_say_whose_they_are() -> None:
    ranks = (rank_record(0, graph_breaks=1, graph_break_reasons=(REASON,)), rank_record(1, graph_breaks=1))
    text = shown(run_record(*ranks))
    assert REASON in text and "rank 0" in section(text, "Graph breaks")
    assert "no reason was recorded" in section(text, "Graph breaks"), "rank 1 counted a break it cannot explain"
    assert "─ Graph breaks" not in shown(run_record()), "no section without an event"


def test_recompiles_fallbacks_and_limit_hits_each_get_their_lines() -> None:
    rank = rank_record(0, recompiles=1, recompile_reasons=("L['x'].size()[0] == 2",), limit_hits=4, fallbacks=("mlp",))
    text = shown(run_record(rank))
    assert "L['x'].size()[0] == 2" in section(text, "Recompiles")
    assert "mlp" in section(text, "Runs uncompiled") and "4" in section(text, "Recompile limit hits")


def test_text_of_users_and_models_is_never_read_as_markup_or_as_control_codes() -> None:
    nasty = "[red]x[/] [/nope] \x1b[31mRED\x07 \ud800 :smile:"
    run = run_record(
        rank_record(0, device=nasty, fallbacks=(nasty,)), elapsed_s={nasty: 1.0}, sample=Sample(nasty, nasty, nasty),
        verdicts=(Verdict(nasty, False, nasty),), start=start_record(recipe=nasty, model=nasty, notes=(nasty,)),
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    start_panel(console, run.start)
    summary(console, run)
    error(console, nasty, 3)
    with Progress(console, 3) as progress:
        progress.phase(nasty)
    text = printed(console)
    assert "\x1b" not in text and "\x07" not in text
    assert text.count("[red]x[/] [/nope] \\x1b[31mRED\\x07 \\ud800 :smile:") == 12


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", [GPU, "cpu", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"])
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_line_is_wider_than_the_console_and_no_cell_is_cut(width: int, device: str, ranks: int) -> None:
    reasons = (REASON * 3, "x" * 200)
    records = [rank_record(r, device=device, graph_breaks=r, graph_break_reasons=reasons) for r in range(ranks)]
    run = run_record(*records, steps=100, sample=Sample("p" * 500, "e " * 200, ""), start=start_record(device=device))
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    start_panel(console, run.start)
    summary(console, run)
    text = printed(console)
    assert max(map(len, text.splitlines())) <= width
    assert len(rank_rows(text)) == ranks and "75,312" in rank_rows(text)[0], "rank, hash and speed are always shown"
    assert "NVIDIA RTX" in device or "…" not in section(text, "Ranks"), "only a long device name is shortened"


def test_columns_left_out_for_want_of_width_are_named() -> None:
    assert "not shown" not in shown(run_record(), width=120)
    narrow = shown(run_record(), width=80)
    assert re.search(r"not shown at this width.*cache hits", narrow)


def loss_steps(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"^\s+([\d,]+) .*\de-\d\d ", section(text, "Loss"), re.M)]


def test_the_loss_table_shows_every_step_of_a_short_run_and_a_sample_of_a_long_one() -> None:
    assert loss_steps(shown(run_record(steps=12))) == list(range(1, 13))
    sampled = loss_steps(shown(run_record(steps=1000)))
    assert 10 <= len(sampled) <= 14 and sampled[0] == 1 and sampled[-1] == 1000 and sampled == sorted(set(sampled))


def test_the_loss_table_holds_the_eval_losses_and_each_steps_figures() -> None:
    text = section(shown(run_record(steps=3)), "Loss")
    assert re.search(r"^\s+0 .*2\.9134\s*$", text, re.M) and re.search(r"^\s+3 .*1\.4711\s*$", text, re.M)
    assert re.search(r"^\s+1\s+2\.3810\s+2\.00e-04\s+0\.731\s+75,327\s+423\.1", text, re.M)
    many = run_record(steps=1000, evals=tuple(EvalRecord(n, 2.0) for n in range(0, 1001, 10)))
    assert len(section(shown(many), "Loss").splitlines()) < 28, "evaluations are sampled too"


def test_skipped_steps_are_named_and_a_missing_figure_does_not_break_the_table() -> None:
    steps = (step_record(1, skipped=True, grad_norm=float("inf")), step_record(2, loss=float("nan"), step_s=0.0))
    text = section(shown(replace(run_record(), steps=steps, evals=())), "Loss")
    assert "1 step skipped" in text and "nan" in text and "inf" in text


def test_the_memory_table_is_that_of_the_rank_with_the_highest_peak() -> None:
    ranks = (rank_record(0, peak_mib=5_111), rank_record(1, peak_mib=9_222))
    text = section(shown(run_record(*ranks)), "VRAM by phase")
    assert "rank 1" in text and text.count("9,222") == len(PHASES) and "5,111" not in text
    for word in (*PHASES, "allocated", "reserved", "peak", "total", "143,771"):
        assert word in text


def test_memory_on_a_cpu_is_called_resident_memory() -> None:
    text = shown(run_record(rank_record(0, device="cpu"), start=start_record(device="cpu")))
    assert "resident memory" in text.lower() and "VRAM" not in text


def test_the_total_line_has_compilations_speed_of_all_ranks_and_peak() -> None:
    *_, last, folder = shown(run_record(rank_record(0), rank_record(1, compilations=9))).rstrip().splitlines()
    assert folder.strip() == f"run folder {start_record().run_dir}"
    assert re.search(r"6 to 9 compilations", last) and "150,625 tokens/s" in last and "peak 7,491 MiB" in last
    assert "6 compilations in this process" in shown(run_record())


def test_elapsed_time_is_listed_by_phase_with_its_sum() -> None:
    text = section(shown(run_record()), "Elapsed")
    assert re.search(r"compile\s+41\.0", text) and re.search(r"total\s+162\.6", text)


def test_the_start_panel_states_what_is_about_to_run() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    start_panel(console, start_record())
    text = printed(console)
    facts = """llama1b|unsloth/Llama-3.2-1B-Instruct|11,272,192|1,247,086,592|0.90 %|NVIDIA H200 × 2|varlen|2 × 2,048
nf4, double quantised|32,768 tokens|strict, scope layer|adamw (fused)|3,412 rows|251 blocks|97.3 %|180 rows|100 steps
runs/llama1b-20260301-120000|dtype auto: bfloat16, compute capability 9.0"""
    for fact in re.split(r"[|\n]", facts):
        assert fact in text, fact


def test_a_console_that_is_no_terminal_is_plain_and_of_fixed_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    console = make_console(io.StringIO())
    assert console.width == 120 and not console.is_terminal and not console.is_jupyter
    summary(console, run_record())
    start_panel(console, start_record())
    error(console, "message", 2)
    assert "\x1b" not in printed(console)
    monkeypatch.setenv("COLUMNS", "77")
    assert make_console(io.StringIO()).width == 77
    monkeypatch.setenv("COLUMNS", "wide")
    assert make_console(io.StringIO()).width == 120


def test_an_output_that_is_not_unicode_gets_readable_text_and_no_crash() -> None:
    raw = io.BytesIO()
    console = make_console(io.TextIOWrapper(raw, encoding="ascii"))
    start_panel(console, start_record(model="modèle"))
    summary(console, run_record())
    text = raw.getvalue().decode("ascii")
    assert "2 x 2,048" in text and "PASS" in text and "mod\\xe8le" in text
