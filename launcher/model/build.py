"""Builds the model that a run trains, in each process on its own device: NF4 base, LoRA, forward over packed blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from launcher.errors import RecipeError
from launcher.model.attention import (
    BlockFacts,
    attention_name,
    check_attention,
    check_needs,
    choose_attention,
    register_attention,
)
from launcher.model.families import Family, head_width
from launcher.model.family_choice import family_of
from launcher.model.grouped import group_projections
from launcher.model.layer_kinds import attention_needs
from launcher.model.layer_shape import computes_as_llama, family_of_shape, norms_as_llama
from launcher.model.load import (
    Base,
    bnb_config,
    count_parameters,
    empty_model,
    is_prequantised,
    load_base,
    random_base,
)
from launcher.model.loftq import check_loftq
from launcher.model.logits import logit_bytes, logits_rule
from launcher.model.lora import attach_lora
from launcher.model.lora_targets import check_targets, target_notes
from launcher.model.packed import PackedCausalLM, use_native_norm
from launcher.model.quantised_checkpoints import check_quantisation
from launcher.model.sizes import kept_by_adapters, step_sizes
from launcher.model.trained_tokens import unwrapped
from launcher.model.weight_files import check_depth, check_headers, read_headers
from launcher.ops.chunk_sizes import chunk_rows, product_rows
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import Recipe
from launcher.records.run import Verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuiltModel:
    """One process's model. `packed` is trained; `peft` saves its adapters and shares every module with it."""

    peft: PeftModel
    packed: PackedCausalLM
    lora: LoraSection
    family: Family
    dtype: torch.dtype
    attention: str  # the path
    attention_why: str
    parameters: int
    trainable: int
    quantization: str
    loaded: tuple[Verdict, ...]  # whether the base is what its files hold; empty for random weights
    notes: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """What decides how much memory a token of a micro batch takes, as memory/forecast.py's Shapes names it."""
        layers = self.packed.body.layers
        adapted: list[Any] = [module for module in layers.modules() if hasattr(module, "lora_A")]
        sizes = step_sizes(
            self.peft.config,
            attention=self.attention,
            dtype=self.dtype,
            loss_chunk=self.packed.loss_chunk,
            trainable=self.trainable,
        )
        sizes["masks"] = len({kind.window for kind in self.packed.kinds})
        return {**sizes, "by_adapters": kept_by_adapters(adapted, self.lora) // len(layers)}


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`model.dtype` -> dtype. auto: bfloat16 where the device supports it, float16 on older GPUs, float32 on a CPU."""
    if wanted != "auto":
        dtype = DTYPES[wanted]
        if dtype == torch.bfloat16 and device.type == "cuda" and not _computes_bf16(device):
            raise RecipeError("model.dtype=bfloat16 needs compute capability 8.0. Use model.dtype=auto or float16.")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if _computes_bf16(device) else torch.float16
    return torch.float32


def check_model(recipe: Recipe, source: str, config: Any, device: torch.device) -> PreTrainedModel:
    """Check, before any weight is read, that model and device can do what the recipe asks, and that the files hold the
    model's tensors. Returns the model without weights. Raises RecipeError."""
    family_of(config, max_length=recipe.data.max_length, auto=recipe.model.family == "auto")
    check_attention(recipe.model.attention, device, choose_dtype(recipe.model.dtype, device))
    check_needs(recipe.model.attention, attention_needs(config, max_length=recipe.data.max_length))
    headers = None
    if recipe.model.init == "pretrained":
        check_quantisation(config, recipe.quant)
        headers = read_headers(source, recipe.model.revision)
        check_depth(headers or {}, config.num_hidden_layers)
    skeleton = empty_model(config)
    _family(recipe, config, lambda: skeleton)
    check_targets(skeleton, recipe.lora)
    if recipe.lora.init == "loftq":
        check_loftq(recipe, prequantised=is_prequantised(config))
    if headers is not None:
        check_headers(headers, skeleton, prequantised=is_prequantised(config), double=recipe.quant.double)
    return skeleton


def build_model(
    recipe: Recipe,
    source: str,
    config: Any,
    *,
    device: torch.device,
    blocks: BlockFacts,
    phase: Callable[[str], object],
    token_ids: Sequence[int] = (),
) -> BuiltModel:
    """Build from a located `source` and its config, which have passed `check_model`.

    The loss works in chunks of one size that suits all widths of `blocks`, over as many positions as may have a target.
    `token_ids`: of lora.trainable_tokens. `phase(name)` is called after each phase that takes memory.
    """
    family = _family(recipe, config, lambda: empty_model(config))
    dtype = choose_dtype(recipe.model.dtype, device)
    path, why = _choose_path(recipe, config, device, dtype, alone=blocks.alone)
    loaded = build_base(recipe, source, config, dtype=dtype, device=device)
    base: Any = loaded.model
    register_attention(path)
    base.set_attn_implementation(attention_name(path))
    phase("after load")
    notes = (*loaded.notes, *target_notes(base, recipe.lora.targets))
    peft = attach_lora(base, recipe.lora, seed=recipe.train.seed, token_ids=token_ids)
    if family.named or all(map(computes_as_llama, base.model.layers)):
        group_projections(base.model.layers, mlp=family.mlp)
    if family.named:
        _forget_windows(base.model.layers)
    # What another process must load to use the adapter: a hub id, or a path that does not depend on its folder.
    peft.peft_config["default"].base_model_name_or_path = source
    peft.peft_config["default"].revision = recipe.model.revision
    loss_rows = _loss_rows(blocks, micro_batch=recipe.train.micro_batch)
    vocabulary, budget = unwrapped(base.lm_head).weight.shape[0], recipe.memory.loss_chunk_mib
    _replace_last_norm(recipe, family, base)
    packed = PackedCausalLM(
        base,
        attention=path,
        max_length=recipe.data.max_length,
        loss_chunk=chunk_rows(loss_rows.values(), vocabulary, budget, itemsize=logit_bytes(logits_rule(config), dtype)),
        loss_rows=loss_rows,
        max_seqlen=blocks.max_seqlen,
    )
    packed.neftune_alpha = recipe.train.neftune_alpha
    phase("after adapters")
    parameters, trainable = count_parameters(peft)
    return BuiltModel(
        peft,
        packed.train(),
        recipe.lora,
        family,
        dtype,
        attention=path,
        attention_why=why,
        parameters=parameters,
        trainable=trainable,
        quantization=_describe(config, recipe, dtype),
        loaded=() if loaded.verdict is None else (loaded.verdict,),
        notes=notes,
    )


def _family(recipe: Recipe, config: Any, skeleton: Callable[[], PreTrainedModel]) -> Family:
    """The family, completed from the model without weights where it has no row."""
    family = family_of(config, max_length=recipe.data.max_length, auto=recipe.model.family == "auto")
    return family if family.named else family_of_shape(skeleton(), family)


def _loss_rows(blocks: BlockFacts, *, micro_batch: int) -> dict[int, int]:
    """By the positions of a micro batch, for how many of them the loss is computed."""
    tokens = {width: micro_batch * width for width in blocks.widths}
    return {n: product_rows(n, blocks.targets.get(width, n)) for width, n in tokens.items()}


def _replace_last_norm(recipe: Recipe, family: Family, base: Any) -> None:
    """By PyTorch's own operator where no scope compiles it."""
    if recipe.compile.scope == "layer" and (family.named or norms_as_llama(base.model.norm)):
        use_native_norm(base.model.norm)


def _choose_path(
    recipe: Recipe, config: Any, device: torch.device, dtype: torch.dtype, *, alone: bool
) -> tuple[str, str]:
    needs = attention_needs(config, max_length=recipe.data.max_length)
    wanted, head = recipe.model.attention, head_width(config)
    return choose_attention(wanted, device, dtype, alone=alone, head=head, needs=needs)


def _forget_windows(layers: Any) -> None:
    """Body gives each layer its window; the module's own number would be a graph of its own, to no purpose. Only where
    the code is known to read it for nothing else: some rotate by whether a layer has a window."""
    for layer in layers:
        if hasattr(layer.self_attn, "sliding_window"):
            layer.self_attn.sliding_window = None


def build_base(recipe: Recipe, source: str, config: Any, *, dtype: torch.dtype, device: torch.device) -> Base:
    """The frozen base that the recipe asks for, on `device`: loaded or random, the same at each call."""
    if recipe.model.init == "random":
        base = Base(random_base(config, quant=recipe.quant, dtype=dtype, device=device, seed=recipe.train.seed))
    else:
        base = load_base(source, config, quant=recipe.quant, dtype=dtype, device=device, revision=recipe.model.revision)
    base.model.config.use_cache = False
    return base


def _describe(config: Any, recipe: Recipe, dtype: torch.dtype) -> str:
    wanted = bnb_config(recipe.quant, dtype)
    if wanted is None:
        return "none"
    own = getattr(config, "quantization_config", None)  # of a checkpoint that is already quantised
    settings = own if isinstance(own, dict) else (own or wanted).to_dict()
    double = ", double quantised" if settings.get("bnb_4bit_use_double_quant") else ""
    return f"{settings['bnb_4bit_quant_type']}{double}{', as the checkpoint came' if own else ''}"


def _computes_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
