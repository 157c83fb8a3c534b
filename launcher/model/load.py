"""Reads a model: config and tokenizer first, without running any code that comes with it, then the frozen base in NF4.

The base (bitsandbytes) comes from a full checkpoint, from one that is already quantised, or is random. The linears
inside the decoder layers are quantised; embedding, norms and head stay in the compute dtype.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.integrations import replace_with_bnb_linear
from transformers.utils import cached_file, find_adapter_config_file

from launcher.credentials import shortened
from launcher.errors import RecipeError
from launcher.model.quantised_checkpoints import quantisation_of
from launcher.model.token_vectors import check_pad_id
from launcher.model.weight_files import Headers, check_headers, read_headers
from launcher.model.weight_values import compare_with_files
from launcher.recipe.schema import ModelSection, QuantSection
from launcher.records.run import Verdict

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's: transformers attaches the adapter of a folder that holds it


@dataclass(frozen=True)
class Base:
    """The frozen base. `verdict` says whether it is what its files hold; None for random weights."""

    model: PreTrainedModel
    verdict: Verdict | None = None
    notes: tuple[str, ...] = ()


def load_config(source: str, model: ModelSection) -> Any:
    """The transformers config at `source`. Raises RecipeError for a model that needs its own code to run."""
    try:
        config = AutoConfig.from_pretrained(source, revision=_revision(source, model), trust_remote_code=False)
    except Exception as error:  # what is wrong with the file may show as any error
        raise RecipeError(
            f"model {source!r} must load without remote code and with a config.json that transformers knows:\n"
            f"{_first_line(error)}"
        ) from None
    check_pad_id(config)
    return config


def load_tokenizer(source: str, model: ModelSection, *, stand_in: Path) -> Any:
    """The model's tokenizer; for random weights without a tokenizer beside the config, the one at `stand_in`."""
    if model.init == "random" and os.path.isdir(source) and not (Path(source) / "tokenizer_config.json").is_file():
        source = str(stand_in)
    try:
        return AutoTokenizer.from_pretrained(source, revision=_revision(source, model), trust_remote_code=False)
    except Exception as error:  # what is wrong with a file may show as any error
        raise RecipeError(
            f"model {source!r} must come with a tokenizer: {_first_line(error)}\n"
            "Put its tokenizer files into the folder."
        ) from None


def load_stop_ids(source: str, model: ModelSection) -> tuple[int, ...]:
    """Where generation of this model stops by its generation_config.json; none without one.

    Raises RecipeError for a file that does not say it.
    """
    missing_is_none = {f"_raise_exceptions_for_{cause}": False for cause in ("missing_entries", "connection_errors")}
    file = cached_file(source, "generation_config.json", revision=_revision(source, model), **missing_is_none)
    if file is None:
        return ()
    try:
        stops = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
        found = stops if isinstance(stops, list) else [] if stops is None else [stops]
        return tuple(map(int, found))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"generation_config.json of {source!r} must be JSON with token ids in eos_token_id: {_first_line(error)}\n"
            "Repair the file, or copy it from the model again."
        ) from None


def load_generation(source: str, model: ModelSection, config: Any) -> GenerationConfig:
    """The model's generation_config.json; without one what config.json says of generation, as many bases have it."""
    try:
        return GenerationConfig.from_pretrained(source, revision=_revision(source, model) or "main")
    except OSError:
        return GenerationConfig.from_model_config(config)


def stop_ids_of(generation: GenerationConfig) -> list[int]:
    """The tokens at which generation stops; a config has one, several or none."""
    stops = generation.eos_token_id
    return [] if stops is None else list(stops) if isinstance(stops, list) else [stops]


def bnb_config(quant: QuantSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The BitsAndBytesConfig that loads the base as it is trained; None when nothing is quantised."""
    if quant.type == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.type,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=dtype,
    )


def empty_model(config: Any, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `config` on the meta device. Raises RecipeError where transformers cannot build one."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return model
    except Exception as error:  # what is wrong with a config may show as any error
        raise RecipeError(
            f"config.json must describe a model that transformers can build; it raises {_first_line(error)}"
        ) from None


def load_base(
    source: str, config: Any, *, quant: QuantSection, dtype: torch.dtype, device: torch.device, revision: str | None
) -> Base:
    """Load the checkpoint at `source` (folder or hub id) to `device`, quantise it unless it already is, and compare it
    with its files. Raises RecipeError where it cannot be loaded, or is not what the files hold."""
    headers = read_headers(source, revision, download=True)
    assert headers is not None, "downloaded"
    if not os.path.isdir(source):  # a folder has passed check_model
        check_headers(headers, empty_model(config), prequantised=is_prequantised(config), double=quant.double)
    adapter = find_adapter_config_file(source, revision=revision)
    with _without_adapter(headers) as folder:
        model, missing = _from_folder(folder, config, quant=quant, dtype=dtype, device=device)
    # A checkpoint quantised for bf16 may run on a GPU without it, so compute in this run's dtype. transformers leaves
    # what such a checkpoint has not quantised (embeddings, norms, head) in the dtype that it was saved in.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On CPUs with AVX512-BF16 it would evaluate in bf16 whatever is asked for, with scales rounded to bf16, on
            # weights that it packs otherwise in place; so their losses would not be those of the run.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):  # NF4 may be stored as bf16
            parameter.data = parameter.data.to(dtype)
    verdict = compare_with_files(model, headers, missing)
    if not verdict.holds:
        raise RecipeError(
            f"the base must be what its files hold; {verdict.evidence}.\n"
            "Copy or download the checkpoint again; if that changes nothing, this version of transformers misreads it."
        )
    note = "the adapter in the model's folder (adapter_config.json) is ignored: a new one is trained, on the base alone"
    return Base(model, verdict, (note,) if adapter else ())


def _from_folder(
    folder: str, config: Any, *, quant: QuantSection, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, set[str]]:
    """The model that transformers loads, and the names of parameters that it has not filled."""
    wanted = None if is_prequantised(config) else bnb_config(quant, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # An explicit None would switch off the quantisation of the checkpoint itself.
            **({"quantization_config": wanted} if wanted else {}),
        )
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # what is wrong with a checkpoint may show as any error
        raise RecipeError(
            f"the weights must load as config.json describes them; transformers raises {_first_line(error)}"
        ) from error
    return loaded[0], set(loaded[1]["missing_keys"])


@contextmanager
def _without_adapter(headers: Headers) -> Iterator[str]:
    """The folder of the weights; or, where it also holds an adapter, which transformers would attach unasked, a folder
    of links to its other files."""
    folder = Path(next(iter(headers.values())).file).parent
    if not (folder / ADAPTER_CONFIG).is_file():
        yield str(folder)
        return
    with TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file.name != ADAPTER_CONFIG:
                (Path(links) / file.name).symlink_to(file.absolute())
        yield links


def random_base(
    config: Any, *, quant: QuantSection, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """An untrained model of this architecture, drawn and quantised on `device` one weight at a time: the whole model
    never exists in full precision, so an 8B architecture fits wherever its NF4 form does."""
    model: Any = empty_model(config, dtype=dtype)
    quantization = bnb_config(quant, dtype)
    if quantization is not None:
        replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        model.is_loaded_in_4bit = True
    generator = torch.Generator(device=device).manual_seed(seed)
    std = config.initializer_range

    def draw(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, Linear4bit) and name == "weight":
                module.weight = _quantized(draw(parameter.shape), module, quant, device)
            elif parameter.ndim == 1:  # the weights of norms; biases are zero
                value = torch.ones if name == "weight" else torch.zeros
                setattr(module, name, nn.Parameter(value(parameter.shape, dtype=dtype, device=device)))
                if name == "weight":
                    model._init_weights(module)  # of Gemma's norms, which multiply by 1 + weight, it makes zeros
            else:
                setattr(module, name, nn.Parameter(draw(parameter.shape)))
        if (scale := getattr(module, "scalar_embed_scale", None)) is not None:  # of Gemma's embedding: no parameter
            module.embed_scale = torch.tensor(scale, dtype=dtype, device=device)
    with torch.device(device):  # its frequencies are buffers that are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    if computed := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise RecipeError(
            f"model.init=random draws weights; {computed[0]} of this model is computed as it is loaded.\n"
            "Name a checkpoint, with model.init=pretrained."
        )
    return model


def is_prequantised(config: Any) -> bool:
    """Whether the checkpoint is already quantised, by its config."""
    return quantisation_of(config) is not None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a 4-bit weight counts as the matrix it stands for, a tied weight once."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape[0] * state.shape[1]
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


def _quantized(weight: torch.Tensor, module: Linear4bit, quant: QuantSection, device: torch.device) -> Params4bit:
    parameter: Any = Params4bit(
        weight, requires_grad=False, compress_statistics=quant.double, quant_type=quant.type, module=module
    )
    quantized: Params4bit = parameter.to(device)  # moving a full-precision Params4bit quantises it
    return quantized


def _revision(source: str, model: ModelSection) -> str | None:
    return None if os.path.isdir(source) else model.revision


def _first_line(error: Exception) -> str:
    text = shortened(" ".join(str(error).split()), 200)
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
