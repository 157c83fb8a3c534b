"""The summary of a run: ranks, disagreements and their reasons, memory, time, losses, verdicts, the total."""

import ast
import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from launcher.records.explanation import Explanation
from launcher.records.run import EvalRecord, RunPart, Verdict
from tests.support.records import PHASES, bad, rank_record, run_record, section, shown, start_record, step_record

REASON = "Dynamo cannot trace [bold]print[/bold] of builtins[0], user line model.py:12 [/]"


def first_words(text: str, title: str) -> list[str]:
    return [line.split(" ")[0] for line in section(text, title)]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_rank_table_has_a_row_for_each_rank_and_the_extremes_of_several(ranks: int) -> None:
    text = shown(run_record(*(rank_record(rank, peak_mib=5_000 + rank) for rank in range(ranks))))
    words = [word for word in first_words(text, "Ranks") if re.fullmatch(r"\d+|min|max", word)]
    assert words == [*map(str, range(ranks)), *(["min", "max"] if ranks > 1 else [])]
    for word, peak in (("min", 5_000), ("max", 4_999 + ranks)):
        lines = [line for line in section(text, "Ranks") if line.startswith(word)]
        assert all(f" {peak:,} " in line for line in lines)
    assert "graphs by region: layer 2, loss 1" in section(text, "Ranks")
    inside = (
        "inside the graphs: layer 49 nodes, of them 4 opaque calls (qlora.linears 3, qlora.rotary 1) · loss 24 nodes"
    )
    assert inside in section(text, "Ranks")


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
    assert text.count("RANKS DIFFER") == 1
    same = getattr(ranks[0].compile, field)
    expected = [f"rank {rank} {figure}" for rank, figure in enumerate((same, value, same))]
    assert section(text, f"✗ RANKS DIFFER: {column}")[1:4] == expected


def test_figures_that_may_differ_between_ranks_are_no_alarm() -> None:
    text = shown(run_record(rank_record(0, forward_s=1.0), rank_record(1, forward_s=9.0, cache_hits=0)))
    assert "DIFFER" not in text


def test_fewer_graphs_than_planned_are_shown_beside_the_plan() -> None:
    [line] = [line for line in section(shown(run_record(rank_record(0, planned_graphs=2))), "Ranks") if "9f86" in line]
    assert line.startswith("0 NVIDIA H200 2 of 3 ")


def test_a_failed_verdict_reads_fail_and_a_held_one_pass() -> None:
    verdicts = (Verdict("no graph break", True, "0 breaks"), Verdict("no recompile", False, "2 recompiles on rank 1"))
    lines = section(shown(run_record(verdicts=verdicts)), "Verdicts")
    assert lines[0].startswith("Verdicts 1 of 2 hold")
    assert lines[1:3] == ["✓ PASS no graph break 0 breaks", "✗ FAIL no recompile 2 recompiles on rank 1"]


def test_reasons_are_verbatim_and_name_their_ranks() -> None:
    recompiled: dict[str, Any] = {"recompiles": 1, "recompile_reasons": ("a guard",)}
    first = rank_record(0, graph_breaks=1, graph_break_reasons=(REASON,), **recompiled)
    second = rank_record(1, graph_breaks=2, limit_hits=4, fallbacks=("mlp",), **recompiled)
    text = shown(run_record(first, second))
    breaks = section(text, "Graph breaks")
    assert breaks[0].startswith("Graph breaks 3 events")
    assert breaks[1:3] == [f"rank 0 {REASON}", "rank 1 counted, but no reason was recorded"]
    assert section(text, "Recompiles")[1] == "rank 0, 1 a guard"
    assert section(text, "Runs uncompiled")[1] == "rank 1 mlp"
    assert section(text, "Recompile limit hits")[1] == "rank 1 4 hits"
    assert bad(run_record(rank_record(0, graph_breaks=3))) == ["3", "rank 0"] and bad(run_record()) == []
    quiet = shown(run_record())
    assert not any(f"─ {title}" in quiet for title in ("Graph breaks", "Recompile", "Runs uncompiled"))


def loss_rows(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in first_words(text, "Loss") if word[0:1].isdigit()]


def test_the_loss_table_shows_every_step_of_a_short_run_and_a_sample_of_a_long_one() -> None:
    assert loss_rows(shown(run_record(steps=12))) == list(range(13))
    many = run_record(steps=1000, evals=tuple(EvalRecord(n, 2.0) for n in range(0, 1001, 10)))
    rows = loss_rows(shown(many))
    assert rows == sorted(set(rows)) and (rows[0], rows[1], rows[-1]) == (0, 1, 1000)
    assert 12 <= len(rows) <= 18, "evaluations are sampled too"
    assert "12 of 1,000 steps; all are in metrics.jsonl" in section(shown(many), "Loss")[0]


def test_the_loss_table_holds_the_eval_losses_and_each_steps_figures() -> None:
    lines = section(shown(run_record(steps=3)), "Loss")
    assert "0 2.9134" in lines and "1 2.3810 2.00e-04 0.731 75,327 423.1" in lines
    assert lines[6].endswith(" 1.4711")
    assert lines[7] == "loss 2.3810 → 2.1739 (-8.7 %) · eval loss 2.9134 → 1.4711 (-49.5 %)"


def test_spikes_and_an_early_stop_are_said() -> None:
    steps = tuple(step_record(n, spike=n > 2) for n in range(1, 5))
    text = shown(replace(run_record(), steps=steps, stopped="early, after step 4 of 8"))
    assert "2 steps spiked (the first ones' batches are in bad_batches/): 3, 4" in section(text, "Loss")
    assert "stopped early, after step 4 of 8" in text


def test_skipped_steps_are_named_and_a_missing_figure_does_not_break_the_table() -> None:
    steps = (step_record(1, skipped=True, grad_norm=float("inf")), step_record(2, loss=float("nan"), step_s=0.0))
    record = replace(run_record(evals=()), steps=steps)
    lines = section(shown(record), "Loss")
    assert bad(record) == ["nan", "inf"]
    assert lines[3:5] == ["1 2.3810 2.00e-04 inf 75,327 423.1", "2 nan 2.00e-04 0.731 - 0.0"]
    assert "1 step skipped by the fp16 loss scaler (overflow): 1" in lines


def test_the_memory_table_is_that_of_the_rank_with_the_highest_peak_and_the_forecast_is_beside_it() -> None:
    ranks = (rank_record(0, peak_mib=5_111), rank_record(1, peak_mib=9_222))
    lines = section(shown(run_record(*ranks, start=start_record(forecast_mib=9_000.0))), "VRAM by phase")
    assert lines[0].startswith("VRAM by phase rank 1, the highest peak of 2 ranks")
    assert lines[1:3] == ["allocated reserved peak device total", "phase MiB MiB MiB MiB"]
    assert lines[4:9] == [f"{name} {n * 1000:,} {n * 1200:,} 9,222 143,771" for n, name in enumerate(PHASES)]
    assert lines[9] == "peak forecast 9,000 MiB, measured 9,222 MiB (+2.5 %)"


def test_memory_on_a_cpu_is_called_resident_memory() -> None:
    text = shown(run_record(rank_record(0, device="cpu"), start=start_record(device="cpu")))
    assert section(text, "Resident memory")[1] == "resident peak machine total" and "VRAM" not in text


def test_the_end_has_compilations_the_speed_of_all_ranks_the_peak_and_the_folder() -> None:
    record = run_record(rank_record(0), rank_record(1, compilations=9), adapter=None)
    *_, total, folder = shown(record).splitlines()
    assert total.strip() == "6 to 9 compilations per process · 150,625 tokens/s · peak 7,491 MiB VRAM"
    assert folder.strip() == f"run folder {start_record().run_dir}"
    assert "6 compilations in this process" in shown(run_record())


def test_what_came_from_the_compile_cache_and_what_did_not_is_said() -> None:
    text = shown(run_record(rank_record(0, cache_hits=5), rank_record(1, cache_hits=4, cache_misses=1)))
    assert "code of graphs: 4 to 5 from the cache, 0 to 1 generated" in section(text, "Ranks")
    assert "code of graphs" not in shown(run_record(rank_record(0, cache_hits=0)))


def test_a_resumed_run_shows_its_starts_with_host_steps_and_seconds_lost() -> None:
    parts = (RunPart("one", 1, 4, 0.0), RunPart("two", 5, 4, 2.25), RunPart("two", 5, 1200))
    lines = section(shown(replace(run_record(), parts=parts)), "Starts of this run")
    assert [line for line in lines if line[:1].isdecimal()] == [
        "1 one 1 to 4 0.0",
        "2 two none 2.2",
        "3 two 5 to 1,200 0.0",
    ]
    assert "Starts of this run" not in shown(replace(run_record(), parts=parts[:1]))


def test_what_was_learned_comes_first_and_what_to_do_next_last() -> None:
    titles = re.findall(r"^─ (\S+)", shown(run_record(rank_record(0, graph_breaks=1))), re.M)
    assert titles == ["Loss", "Sample", "Ranks", "VRAM", "Graph", "Elapsed", "Verdicts", "Next"]


def test_what_to_do_next_is_code_that_loads_the_adapter_of_a_run_whose_claims_hold() -> None:
    lines = section(shown(run_record(adapter="/runs/it's/adapter")), "Next")
    code = "\n".join([lines[1].removeprefix("load "), *lines[2:4]])
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert names == {"AutoPeftModelForCausalLM", "adapter", "model"} and "/runs/it's/adapter" in code
    unsaved = section(shown(run_record(adapter="/a", recipe={"train": {"save_every": 0}})), "Next")
    assert "raise train.steps" in "".join(lines) and "raise train.steps" not in "".join(unsaved)
    failed = (Verdict("no recompile", False, "2 recompiles"),)
    assert all("─ Next" not in shown(run_record(**change)) for change in ({"adapter": None}, {"verdicts": failed}))


@pytest.mark.parametrize("program", ["qlora-launcher", "python launcher/main.py"])
def test_the_commands_that_come_next_begin_as_this_one_did(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{program.split('/')[-1]}", "recipe=tiny"])
    text = shown(run_record(adapter="/runs/a/adapter", recipe={"train": {"save_every": 1}}))
    assert f"{program} mode=generate run=" in text and f"{program} mode=export run=" in text


def test_a_sample_that_is_missing_says_why() -> None:
    text = shown(run_record(sample=None, no_sample="run.sample_tokens=0"))
    assert section(text, "Sample")[1] == "none: run.sample_tokens=0"


def test_elapsed_time_is_listed_by_phase_with_its_sum() -> None:
    lines = section(shown(run_record()), "Elapsed by phase")
    assert lines[5].startswith("compile 41.0 25 % ━") and "total 162.6" in lines
    assert lines[6].count("━") == 24 and lines[7].count("━") == 1, "the longest, and one that is not nothing"


def test_an_explanation_is_shown_once_with_its_ranks_above_dynamos_own_words() -> None:
    why = Explanation("a length of 15", "m.py:3: y = x", "16", "15", "Set [b]data.batching[/b]=packed", "0/0: [x] raw")
    others = tuple(replace(why, what=f"other {n}") for n in range(5))
    ranks = [rank_record(r, explanations=(why, *others), recompiles=1, recompile_reasons=("raw",)) for r in (0, 1)]
    text = shown(run_record(*ranks))
    assert section(text, "Why it broke")[1:7] == [
        "rank 0, 1 a length of 15", "line m.py:3: y = x", "before 16", "now 15",
        "remedy Set [b]data.batching[/b]=packed", "dynamo 0/0: [x] raw",
    ]  # fmt: skip
    assert "2 more explanations in report.json" in section(text, "Why it broke")
    assert text.index("Why it broke") < text.index("─ Recompiles")
    assert ranks[0].as_report()["compile"]["explanations"][0]["remedy"] == why.remedy
    assert "Why it broke" not in shown(run_record())


def test_the_eval_loss_of_a_saved_adapter_that_is_not_the_last_steps_is_told() -> None:
    assert "of the saved adapter" not in shown(run_record(eval_adapter=1.4711))
    losses = section(shown(run_record(eval_adapter=1.2)), "Loss")
    assert "eval loss 2.9134 → 1.4711 (-49.5 %) · of the saved adapter, the best step's: 1.2000" in " ".join(losses)
