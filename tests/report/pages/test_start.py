"""The start panel: what is about to run, its widths, streams, and what the loss sees."""

from typing import Any

import pytest

from tests.support.records import shown, start_record

CAPTURE = "off (capture failed: called a synchronizing CUDA operation)"


def started(**changes: Any) -> str:
    return " ".join(shown(start_record(**changes)).split())


@pytest.mark.parametrize(
    ("changes", "facts", "absent"),
    [
        (
            {},
            "recipe own [bold]|model unsloth/Llama-3.2-1B-Instruct (llama)|NVIDIA H200 × 2|"
            "11,272,192 trainable of 1,247,086,592 (0.90 %)|bfloat16 · nf4, double quantised|attention varlen: native|"
            "compile strict, scope layer|CUDA graphs on|activations none|optimizer adamw (fused)|"
            "B × S = 2 × 2,048 · accumulation 4 · 2 ranks|step 32,768 tokens, all ranks · 100 steps|"
            "3,412 rows, packed: 251 blocks, 97.3 % filled · 6.40 epochs|validation 180 rows|"
            "assistant in 3,412 rows · template: the tokenizer's own|run folder runs/llama1b-20260301-120000|"
            "note dtype auto: bfloat16, compute capability 9.0",
            "computed|forecast|at most",
        ),
        ({"lora": "r 16, alpha 32 · dora"}, "of 1,247,086,592 (0.90 %) · r 16, alpha 32 · dora|bfloat16", "lora"),
        (
            {"widths": (64, 512, 2048)},
            "B × S = 2 × (64, 512, 2,048)|step at most 32,768 tokens|6.40 epochs",
            "computed",
        ),
        (
            {"streamed": True, "train_rows": 0, "epochs": None},
            "streamed, packed: 251 blocks, 97.3 % filled, in the first window",
            " 0 rows|epochs",
        ),
        (
            {"loss_on": {"assistant": 3000, "all": 1}, "template": "chatml"},
            "assistant in 3,000 rows, all in 1 row · template: chatml",
            "3,000 row,",
        ),
        (
            {"loss_tokens": (2425,)},
            "in 3,412 rows · computed for at most 2,425 of 4,096 tokens · template",
            "% of the tokens",
        ),
        (
            {"widths": (64, 512, 2048), "loss_tokens": (128, 500, 2048)},
            "· computed for at most 49 to 100 % of the tokens · template",
            "of 4,096",
        ),
        ({"loss_tokens": (4096,)}, "in 3,412 rows · template", "computed"),
        ({"cuda_graphs": CAPTURE}, f"CUDA graphs {CAPTURE}", "graphs on"),
        ({"activations": "auto: keep 12", "forecast_mib": 7e3}, "auto: keep 12 · peak forecast 7,000 MiB", "none"),
    ],
)
def test_the_start_panel_states_what_is_about_to_run(changes: dict[str, Any], facts: str, absent: str) -> None:
    text = started(**changes)
    assert [fact for fact in facts.split("|") if fact not in text] == []
    assert [fact for fact in absent.split("|") if fact in text] == []
