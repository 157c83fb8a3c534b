"""Before the first step, loss and gradients are compared with stock code; nothing of that lasts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.errors import ContractError
from launcher.model.build import BuiltModel
from launcher.model.packed import PackedCausalLM
from launcher.ops import qlora_linear
from launcher.proof.start import LEAST, pieces_of, start_verdict
from launcher.proof.stock import stock_code
from tests.conftest import small_config
from tests.support.any_models import build_any
from tests.support.family_figures import MIXED, RECIPE, build, compiled, config_of, differences
from tests.support.runs import adapter, events_of, lines, record_of, trained
from tests.support.workers import built, documents

PIECES = [torch.randint(8192, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 9)]
SHORT = [piece[:11] % 251 for piece in PIECES]  # fits the vocabulary and the blocks of `config_of`
AUTO = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"family": "auto"})})


@pytest.mark.parametrize(("model_type", "dtype"), [("helium", "float32"), ("helium", "bfloat16"), ("llama", "float32")])
def test_a_model_that_computes_as_stock_code_passes_with_or_without_a_row(model_type: str, dtype: str) -> None:
    model = build_any(model_type, dtype=dtype)
    assert model.family.named == (model_type == "llama")
    verdict = start_verdict(model, PIECES, seed=0)
    assert verdict.holds and "29 tokens in 2 documents" in verdict.evidence, verdict.evidence


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_starts_from_the_base_is_compared_with_its_start(
    init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_any("llama", lora={"init": init})
    before = {name: parameter.detach().clone() for name, parameter in model.peft.named_parameters()}
    verdict = start_verdict(model, PIECES, seed=0)
    assert verdict.holds, verdict.evidence
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.peft.named_parameters())
    monkeypatch.setattr(qlora_linear, "update_factors", lambda a, b, count: (a[:count], b[:count]))
    assert not start_verdict(model, PIECES, seed=0).holds


def test_more_targets_than_the_run_has_are_compared() -> None:
    model = build_any("llama")
    model.packed.loss_bounds = bounds = {29: 5}
    verdict = start_verdict(model, PIECES, seed=0)
    assert verdict.holds and model.packed.loss_bounds is bounds, verdict.evidence


def test_a_head_that_scales_logits_is_named() -> None:
    verdict = start_verdict(build_any("cohere"), PIECES, seed=0)
    assert not verdict.holds and verdict.evidence.startswith("first difference: lm_head, 1.5e+01 apart")


def scaled_embedding(model: BuiltModel) -> None:
    embed = model.packed.embed
    model.packed.embed = nn.Sequential(embed, Scale())  # as a forward that scales what the embedding gives
    model.packed.embed.weight = embed.weight


class Scale(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * hidden


def later_positions(model: BuiltModel) -> None:
    model.packed.cos, model.packed.sin = model.packed.cos.roll(1, 0), model.packed.sin.roll(1, 0)


def one_document(model: BuiltModel) -> None:
    whole = model.packed.hidden_states
    model.packed.hidden_states = (  # type: ignore[method-assign]
        lambda ids, positions, numbers, *rest, **kwargs: whole(ids, positions, numbers * 0, *rest, **kwargs)
    )


def other_projection(model: BuiltModel) -> None:
    projection: Any = model.packed.body.layers[1].mlp.down_proj
    projection.__class__ = type(
        "Other", (type(projection),), {"__module__": "launcher.x", "forward": lambda self, x: 2 * self.base_layer(x)}
    )


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (scaled_embedding, "the input of model.layers.0"),
        (later_positions, "model.rotary_emb"),
        (one_document, r"model.layers.0.self_attn.*\(document 2 of the comparison\)"),
        (other_projection, "model.layers.1.mlp"),
    ],
)
def test_the_first_module_that_differs_is_named(fault: Callable[[BuiltModel], None], first: str) -> None:
    model = build_any("helium")
    fault(model)
    verdict = start_verdict(model, PIECES, seed=0)
    assert not verdict.holds
    with pytest.raises(AssertionError, match=f"first difference: {first}"):
        raise AssertionError(verdict.evidence)


def forgotten_windows(model: BuiltModel) -> None:
    for layer in model.packed.body.layers:
        layer.self_attn.sliding_window = None


@pytest.mark.parametrize(("model_type", "changes"), [("exaone4", {}), ("cohere2", {"logit_scale": 1.0})])
def test_layers_that_rotate_by_whether_they_have_a_window_train_as_newly_built_ones(
    model_type: str, changes: dict[str, Any]
) -> None:
    config = config_of(model_type, **{**MIXED, "sliding_window": 4096}, **changes)
    loss, gradients = differences(config, AUTO)
    assert loss < 1e-5 and max(gradients.values()) < 1e-4
    model, _ = build(config, AUTO)
    assert start_verdict(model, SHORT, seed=0).holds
    forgotten_windows(model)
    verdict = start_verdict(model, SHORT, seed=0)
    assert not verdict.holds and "first difference: model.layers." in verdict.evidence
    assert {layer.self_attn.sliding_window for layer in model.packed.body.layers} == {None}


@pytest.mark.parametrize("model_type", ["exaone4", "cohere2"])
@pytest.mark.usefixtures("clean_dynamo")
def test_layers_with_and_without_a_window_of_their_own_are_planned_as_two_kinds(model_type: str) -> None:
    kinds, observer = compiled(config_of(model_type, **{**MIXED, "sliding_window": 4096}), recipe=AUTO)
    assert kinds == 2 and observer.record().graphs_by_region["layer"] == 4
    assert observer.record().recompiles == 0


def test_inside_stock_code_a_named_family_has_its_own_windows_and_afterwards_none() -> None:
    model, _ = build(config_of("gemma2"))
    attentions: list[Any] = [layer.self_attn for layer in model.packed.body.layers]
    with stock_code(model.peft):
        assert [one.sliding_window for one in attentions] == [4, None, 4, None]
    assert [one.sliding_window for one in attentions] == [None] * 4


def test_a_wrong_gradient_under_a_right_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedCausalLM.forward

    def longer(self: Any, *inputs: Any) -> Tensor:
        loss = right(self, *inputs)
        return loss + 0.1 * (loss - loss.detach())

    monkeypatch.setattr(PackedCausalLM, "forward", longer)
    verdict = start_verdict(build_any("helium"), PIECES, seed=0)
    assert not verdict.holds and "the gradients of all adapters" in verdict.evidence


def test_a_model_and_its_random_states_are_as_before_bit_by_bit() -> None:
    model = build_any("llama", lora={"dropout": 0.5})
    before = {name: parameter.detach().clone() for name, parameter in model.peft.named_parameters()}
    classes, state = [type(module) for module in model.peft.modules()], torch.get_rng_state()
    assert start_verdict(model, PIECES, seed=0).holds  # the comparison has no dropout
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.peft.named_parameters())
    assert [type(module) for module in model.peft.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.peft.get_base_model().config._attn_implementation == "packed_sdpa"
    assert {module.p for module in model.peft.modules() if isinstance(module, nn.Dropout)} == {0.5}
    assert all(parameter.grad is None for parameter in model.peft.parameters())


def test_a_run_that_begins_with_the_comparison_has_the_bits_of_one_that_does_not(make: Any, tmp_path: Path) -> None:
    for wanted in ("on", "off"):
        trained(make(wanted, proof={"start": wanted}, train={"steps": 3}, lora={"dropout": 0.1}))
    assert lines(tmp_path / "on") == lines(tmp_path / "off")
    assert adapter(tmp_path / "on") == adapter(tmp_path / "off")


def test_the_verdict_is_in_the_record_where_the_run_begins_with_it(make: Any) -> None:
    records = {at: record_of(make(at, proof={"start": at}, train={"steps": 1})) for at in ("on", "auto")}
    claims = {at: [v.claim for v in record.verdicts if v.holds] for at, record in records.items()}
    assert "start equals stock code" in claims["on"]
    assert "start equals stock code" not in claims["auto"]  # a Llama has a row


def any_model(folder: Path, model_type: str) -> str:
    """A folder with the config alone of an architecture without a row."""
    small_config(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("clean_dynamo")
def test_an_architecture_without_a_row_trains_compiled_with_its_verdict(make_recipe: Any, tmp_path: Path) -> None:
    model = {"name": any_model(tmp_path / "m", "helium"), "init": "random", "family": "auto"}
    record = record_of(make_recipe(model=model, train={"steps": 2}))
    assert record.start.family == "helium" and len(record.steps) == 2
    holding = [verdict.claim for verdict in record.verdicts if verdict.holds]
    assert {"start equals stock code", "exactly the planned graphs", "every step ran compiled"} <= {*holding}


def test_a_run_that_does_not_equal_stock_code_ends_with_code_9_before_its_first_step(make: Any, tmp_path: Path) -> None:
    model = {"name": any_model(tmp_path / "m", "cohere"), "init": "random", "family": "auto"}
    with pytest.raises(ContractError, match=r"(?s)'cohere' it does not.*First difference: lm_head.*stock Transformers"):
        events_of(make(model=model))
    assert not (tmp_path / "run" / "adapter").exists()


def test_each_rank_compares_documents_of_its_own_at_least_two_and_no_longer_than_asked(make_recipe: Any) -> None:
    worker = built(make_recipe(), documents((30, 64)))
    blocks = worker.prepared.data.first_blocks
    ranks = [pieces_of(blocks, positions=64, rank=rank, ranks=2) for rank in range(2)]
    assert all(len(pieces) >= 2 and sum(map(len, pieces)) <= 64 for pieces in ranks)
    assert not torch.equal(ranks[0][0], ranks[1][0])
    single = built(make_recipe(), documents((LEAST,))).prepared.data.first_blocks
    assert len(pieces_of(single, positions=LEAST, rank=0, ranks=1)) == 2
