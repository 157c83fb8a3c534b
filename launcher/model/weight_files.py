"""What the files of a checkpoint hold: names, shapes and kinds of its tensors, compared with the model before any
weight is read. weight_values.py compares the values, once they are loaded.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from launcher.errors import GGUF_REMEDY, RecipeError
from launcher.ops.nf4 import BLOCK, BLOCK2

COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that older checkpoints store and the model computes
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # a tied head may be stored as a copy, or alone
FLOATS = ("F64", "F32", "F16", "BF16")
BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}  # kinds in which packed 4-bit weights are stored
QUANTISED = {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"}  # stored beside a packed weight, as weight.*
DOUBLE_QUANTISED = QUANTISED | {"nested_absmax", "nested_quant_map"}
COMPANION = re.compile(r"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)")
PARTS = {  # of names that only another kind of file has, and what to do
    "_orig_mod": "_orig_mod is torch.compile's wrapper: save the unwrapped model.",
    "module": "module is DistributedDataParallel's wrapper: save the unwrapped model.",
    "_fsdp_wrapped_module": "_fsdp_wrapped_module is FSDP's wrapper: save the full state dict.",
    "base_model": "These are PEFT's names: merge the adapter (merge_and_unload) and save the model.",
    "base_layer": "These are PEFT's names: merge the adapter (merge_and_unload) and save the model.",
    "qweight": "qweight is how GPTQ and AWQ store weights: name the unquantised checkpoint.",
    "weight_scale": "weight_scale is how FP8 weights are stored: name the unquantised checkpoint.",
    "weight_scale_inv": "weight_scale_inv is how FP8 weights are stored: name the unquantised checkpoint.",
    "SCB": "SCB is how bitsandbytes stores 8-bit weights: name the unquantised checkpoint.",
}
LISTED = 3  # names in a message


class Header(NamedTuple):
    """What a file says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


Headers = Mapping[str, Header]


def read_headers(source: str, revision: str | None, *, download: bool = False) -> Headers | None:
    """The tensors of the checkpoint at `source` (folder or hub id), in the files that transformers reads.

    None for a hub id whose files are not in the local cache, unless `download`. Raises RecipeError where there are
    none, or they are not whole.
    """
    files = _weight_files(source, revision, download=download)
    if files is None:
        return None
    if missing := [Path(file).name for file in files if not os.path.isfile(file)]:
        raise RecipeError(
            f"weights must be whole; {len(missing)} of the {len(files)} files that {SAFE_WEIGHTS_INDEX_NAME} of "
            f"{source} names are missing: {listed(missing)}.\nCopy or download them again."
        )
    headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    piece = opened.get_slice(name)
                    headers[name] = Header(file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"weights must be whole; {file} is not: {error}\n"
                "Copy or download it again (a pointer of Git LFS becomes the file by `git lfs pull`)."
            ) from None
    return headers


def _weight_files(source: str, revision: str | None, *, download: bool) -> list[str] | None:
    where: dict[str, Any] = {"revision": revision, "local_files_only": not download}
    try:
        return [str(cached_file(source, SAFE_WEIGHTS_NAME, **where))]
    except OSError:
        pass  # it may be in several files
    try:
        index = str(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where))
    except OSError as error:
        if os.path.isdir(source):
            raise _without_weights(Path(source)) from None
        if not download:
            return None
        raise RecipeError(
            f"the hub or the local cache must have {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} of {source}: "
            f"{str(error).splitlines()[0]}\nCheck the connection, or convert the checkpoint to safetensors."
        ) from None
    try:
        files, _ = get_checkpoint_shard_files(source, index, **where)
    except Exception as error:  # what is wrong with a file may show as any error
        if not (download or os.path.isdir(source)):
            return None
        raise RecipeError(
            f"{SAFE_WEIGHTS_INDEX_NAME} must be JSON with metadata and weight_map; that of {source} cannot be read: "
            f"{type(error).__name__}: {error}\nCopy or download it again."
        ) from None
    return [str(file) for file in files]


def _without_weights(folder: Path) -> RecipeError:
    others = sorted(
        path.name for suffix in ("safetensors", "bin", "pt", "pth", "gguf") for path in folder.glob(f"*.{suffix}")
    )
    if any(name.startswith("adapter_model.") for name in others):
        remedy = "adapter_model.* is a LoRA adapter: name its base in model.name."
    elif others and all(name.endswith(".gguf") for name in others):
        remedy = GGUF_REMEDY
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in others):
        remedy = "Convert pickled weights: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
    else:
        remedy = "Complete the checkpoint, or try the architecture alone with model.init=random."
    return RecipeError(
        f"a model folder must hold its weights as safetensors, named {SAFE_WEIGHTS_NAME} or in "
        f"{SAFE_WEIGHTS_INDEX_NAME};\n{folder} has {listed(others) if others else 'none'}.\n{remedy}"
    )


def check_depth(headers: Headers, layers: int) -> None:
    """Raise RecipeError unless the files hold as many layers as config.json says."""
    numbers = {int(found[1]) for name in headers if (found := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    if numbers and max(numbers) + 1 != layers:
        raise RecipeError(
            f"config.json and weights must belong together; num_hidden_layers is {layers}, the files hold the tensors "
            f"of layers 0 to {max(numbers)} (model.layers.{max(numbers)}.* is the last).\n"
            "Use the config.json that came with these weights, or complete the files."
        )


def check_headers(headers: Headers, model: Any, *, prequantised: bool, double: bool = False) -> None:
    """Raise RecipeError unless the files hold exactly the tensors of `model` (which may be on the meta device), as
    floats; or, of a `prequantised` checkpoint, NF4 weights of all linears of the layers and floats else."""
    expected = expected_shapes(model)
    if model.config.tie_word_embeddings and HEAD in headers:
        expected[HEAD] = expected[EMBEDDING]
        if EMBEDDING not in headers:
            del expected[EMBEDDING]
    found = weights_of(headers)
    missing, unexpected = [n for n in expected if n not in found], [n for n in found if n not in expected]
    shapes = [n for n in found if n in expected and not _has_shape(headers, n, expected[n])]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} are missing: {listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} are not the model's: {listed(unexpected)}")
    if shapes:
        name = shapes[0]
        sizes = f"{_size(headers[name].shape)}, by config.json {_size(expected[name])}"
        problems.append(f"{len(shapes)} have another shape: {listed(shapes)} (the first is {sizes})")
    if problems:
        raise RecipeError(
            "\n".join(
                ["the files must hold exactly the tensors of the model:", *problems, _remedy(missing, unexpected)]
            )
        )
    _check_kinds(headers, found, linear_weights(model), prequantised=prequantised, double=double)


def _check_kinds(
    headers: Headers, found: Collection[str], linears: Mapping[str, nn.Linear], *, prequantised: bool, double: bool
) -> None:
    companions: dict[str, set[str]] = {name: set() for name in found if is_packed(headers, name)}
    for companion in filter(None, map(COMPANION.fullmatch, headers)):
        companions.setdefault(companion[1], set()).add(companion[2])
    packed = list(companions)
    kinds = sorted({headers[name].dtype for name in found if name not in packed} - {*FLOATS})
    if kinds:
        names = [name for name in found if headers[name].dtype in kinds]
        raise RecipeError(
            f"weights must be floats of 16 bits or more, or 4-bit NF4 of bitsandbytes; {len(names)} are "
            f"{' and '.join(kinds)}: {listed(names)}.\nName the unquantised checkpoint in model.name."
        )
    if packed and not prequantised:
        raise RecipeError(
            f"config.json must say how weights are quantised; it has no quantization_config, and {len(packed)} are "
            f"4-bit: {listed(packed)}.\nUse the config.json that came with these weights."
        )
    wanted = DOUBLE_QUANTISED if double else QUANTISED
    plain = [name for name in linears if name not in packed] if prequantised else []
    others = [name for name in packed if name not in linears]
    unlike = [name for name in packed if companions[name] != wanted]
    for names, what in ((plain, "not quantised"), (others, "quantised too"), (unlike, "quantised otherwise")):
        if names:
            raise RecipeError(
                "a 4-bit checkpoint must hold all linears of its layers in NF4, quantised alike, and nothing else "
                f"(else layers of several kinds are compiled);\n{len(names)} are {what}: {listed(names)}.\n"
                "Name the unquantised checkpoint in model.name."
            )
    _check_scales(headers, {name: linears[name].in_features * linears[name].out_features for name in packed})


def _check_scales(headers: Headers, elements: Mapping[str, int]) -> None:
    """Raise RecipeError unless the companions of packed weights, of so many elements each, have their sizes."""
    sizes: dict[str, int] = {}
    for name, count in elements.items():
        blocks = -(-count // BLOCK)
        own = {"absmax": blocks, "nested_absmax": -(-blocks // BLOCK2), "quant_map": 16, "nested_quant_map": 256}
        sizes |= {f"{name}.{companion}": size for companion, size in own.items() if f"{name}.{companion}" in headers}
    if wrong := [name for name, size in sizes.items() if torch.Size(headers[name].shape).numel() != size]:
        raise RecipeError(
            f"a 4-bit weight must have a scale for each {BLOCK} of its elements, and the tables of NF4;\n"
            f"{len(wrong)} of these tensors have another size: {listed(wrong)} (the first is "
            f"{_size(headers[wrong[0]].shape)}, by its weight {sizes[wrong[0]]}).\n"
            "Copy, download or quantise the checkpoint again."
        )


def is_packed(headers: Headers, name: str) -> bool:
    """Whether a weight is stored in 4 bits."""
    return any(f"{name}.{companion}" in headers for companion in QUANTISED)


def weights_of(headers: Headers) -> list[str]:
    """The names of weights: without what belongs to a packed weight, and what the model computes itself."""

    def is_weight(name: str) -> bool:
        companion = COMPANION.fullmatch(name)
        return not (COMPUTED.search(name) or (companion and companion[1] in headers))

    return [name for name in headers if is_weight(name)]


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, a tied one once and a 4-bit one as the matrix that it stands for."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes | {name: (linear.out_features, linear.in_features) for name, linear in linear_weights(model).items()}


def linear_weights(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder layers, by the names of their weights."""
    modules = model.named_modules()
    return {f"{name}.weight": m for name, m in modules if ".layers." in name and isinstance(m, nn.Linear)}


def _has_shape(headers: Headers, name: str, shape: tuple[int, ...]) -> bool:
    header = headers[name]
    if not is_packed(headers, name):
        return header.shape == shape
    values = 2 * BYTES.get(header.dtype, 0) * torch.Size(header.shape).numel()
    return values == torch.Size(shape).numel()


def _remedy(missing: Collection[str], unexpected: Collection[str]) -> str:
    parts = {part for name in unexpected for part in name.split(".")}
    if known := [remedy for part, remedy in PARTS.items() if part in parts]:
        return known[0]
    if missing and unexpected and {f"model.{name}" for name in unexpected} <= {*missing}:
        return "These are the names of the model's body: save the whole model, with its head."
    if missing and not unexpected:
        return "Complete the checkpoint: copy, download or save it again."
    return "Use the config.json that came with these weights."


def listed(names: Collection[str]) -> str:
    shown = [*names][:LISTED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
