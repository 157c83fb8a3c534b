"""What each supported architecture shows at test size, on the CPU: `python -m tests.support.family_figures` prints the
table of docs/models.md.

Every mechanism of a family is on, and matters: windows are shorter than documents, caps bite, biases and norms are
drawn.
"""

import copy
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.model.attention import BlockFacts
from launcher.model.build import BuiltModel, build_base, build_model
from launcher.model.families import FAMILIES
from launcher.proof.parity import perturb
from launcher.proof.stock import stock_model, trainable
from launcher.recipe.schema import Recipe
from launcher.train.compiled_regions import regions_of
from tests.conftest import small_config
from tests.support.models import LENGTHS, packed_batch
from tests.support.tensors import relative_error

CPU = torch.device("cpu")
LENGTH = 20  # of a block of `packed_batch`
RECIPE = Recipe.model_validate(
    {
        "model": {"init": "random", "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"max_length": LENGTH},
        "train": {"steps": 1, "micro_batch": 2},
        "compile": {"backend": "aot_eager"},
    }
)
LOCAL = {"sliding_window": 4}
MIXED = {**LOCAL, "layer_types": ["sliding_attention", "full_attention"] * 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.5] * 4,
    "long_factor": [4.0] * 4,
    "partial_rotary_factor": 0.5,
}
SIZE: dict[str, Any] = {"vocab_size": 251, "num_hidden_layers": 4, "initializer_range": 0.1}  # an odd vocabulary
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {**MIXED, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True},
    "ministral": MIXED,
    "mistral": LOCAL,
    "phi3": {**LOCAL, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "qwen2": {**LOCAL, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**LOCAL, "use_sliding_window": True, "max_window_layers": 2},
}


@dataclass(frozen=True)
class Figures:
    """`loss`, `gradients` (the worst adapter's) and `reloaded` are relative differences from stock code, which sees one
    document at a time; `kinds` of layers share a graph each."""

    loss: float
    gradients: float
    kinds: int
    graphs: dict[str, int]
    recompiles: int
    reloaded: float


def config_of(model_type: str, **changes: Any) -> Any:
    return small_config(model_type, **{**SIZE, **SPECIAL, **CHANGES.get(model_type, {}), **changes})


def build(config: Any, recipe: Recipe = RECIPE) -> tuple[BuiltModel, dict[str, Tensor]]:
    """The model of a run, grouped projections included, and its adapters; LoRA B, biases and norms are drawn."""
    blocks = BlockFacts((LENGTH,), alone=False)
    config = copy.deepcopy(config)  # models share theirs, and with it the attention that is set there
    ids = token_ids(recipe)
    built = build_model(recipe, "", config, device=CPU, blocks=blocks, phase=lambda _: None, token_ids=ids)
    _draw_vectors(built.peft)
    return built, perturb(built.peft, seed=0)


def token_ids(recipe: Recipe) -> tuple[int, ...]:
    """Trained tokens, which a recipe for these models names by their ids."""
    return tuple(map(int, recipe.lora.trainable_tokens))


def stock_of(config: Any, adapters: dict[str, Tensor], recipe: Recipe = RECIPE) -> PeftModel:
    """The same weights in stock modules."""
    how: Any = {"dtype": torch.float32, "device": CPU, "token_ids": token_ids(recipe)}
    stock = stock_model(recipe, "", copy.deepcopy(config), **how)
    _draw_vectors(stock)
    with torch.no_grad():
        for name, parameter in trainable(stock):
            parameter.copy_(adapters[name])
    return stock


def _draw_vectors(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))


def one_by_one(model: Any, ids: Tensor, *, train: bool = True) -> float:
    """Summed token losses of all documents, each alone, by transformers' own forward; adds their gradients."""
    total = 0.0
    pieces = [ids[:1, end - size : end] for size, end in zip(LENGTHS, torch.tensor(LENGTHS).cumsum(0), strict=True)]
    for piece in (*pieces, ids[1:]):
        if piece.shape[1] > 1:
            loss = model(input_ids=piece, labels=piece).loss * (piece.shape[1] - 1)
            if train:
                loss.backward()
            total += float(loss.detach())
    return total


def differences(config: Any, recipe: Recipe = RECIPE) -> tuple[float, dict[str, float]]:
    """Relative differences of what trains from the stock model: of the loss, and of the gradients by adapter."""
    built, adapters = build(config, recipe)
    stock = stock_of(config, adapters, recipe)
    ids, *rest = packed_batch(config.vocab_size)
    loss = built.packed(ids, *rest)
    loss.backward()
    expected = one_by_one(stock, ids)
    ours, theirs = ({name: p.grad for name, p in trainable(model)} for model in (built.peft, stock))
    assert ours.keys() == theirs.keys() and expected > 10
    return abs(loss.item() / expected - 1), {name: relative_error(ours[name], theirs[name]) for name in ours}


def compiled(
    config: Any, scope: Literal["layer", "regions"] = "layer", recipe: Recipe = RECIPE
) -> tuple[int, Observer]:
    """Kinds of layers, and what was compiled for a train and an eval pass, and another of each."""
    section = recipe.compile.model_copy(update={"scope": scope})
    torch._dynamo.reset()
    built, _ = build(config, recipe.model_copy(update={"compile": section}))
    observer = Observer()
    plan = Plan(regions_of(built, shapes=1), compile=section, observer=observer)

    def train_and_evaluate(seed: int = 0) -> None:
        batch = packed_batch(config.vocab_size, seed=seed)
        built.packed(*batch).backward()
        with torch.no_grad():
            built.packed(*batch)

    plan.warm_up(train_and_evaluate)
    plan.arm()
    try:
        plan.call(train_and_evaluate, 1)
        plan.check()
    finally:
        plan.release()
    return len(set(built.packed.layer_code())), observer


def reloaded(config: Any, recipe: Recipe = RECIPE) -> float:
    """The relative difference of the packed loss from that of the saved adapter in stock PEFT on the stock base."""
    built, _ = build(config, recipe)
    with tempfile.TemporaryDirectory() as folder:
        built.peft.save_pretrained(folder)
        base: Any = build_base(recipe, "", copy.deepcopy(config), dtype=torch.float32, device=CPU).model
        base.set_attn_implementation("eager")
        stock = PeftModel.from_pretrained(base, folder).train()  # in eval mode some CPUs repack weights
    _draw_vectors(stock)
    batch = packed_batch(config.vocab_size)
    with torch.no_grad():
        return abs(float(built.packed(*batch)) / one_by_one(stock, batch[0], train=False) - 1)


def figures_of(model_type: str) -> Figures:
    config = config_of(model_type)
    loss, gradients = differences(config)
    kinds, observer = compiled(config)
    record = observer.record()
    graphs, worst = record.graphs_by_region, max(gradients.values())
    return Figures(loss, worst, kinds, graphs, record.recompiles, reloaded(config))


def main() -> None:
    print("| `model_type` | packed loss | LoRA gradients | layer graphs | recompiles | adapter in stock PEFT |")
    print("|---|---|---|---|---|---|")
    for model_type in sorted(FAMILIES):
        f = figures_of(model_type)
        graphs = f"{f.graphs['layer']} ({f.kinds} kind{'s' if f.kinds > 1 else ''})"
        print(f"| `{model_type}` | {f.loss:.1e} | {f.gradients:.1e} | {graphs} | {f.recompiles} | {f.reloaded:.1e} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
