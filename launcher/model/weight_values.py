"""Compares a loaded model with the files that it was loaded from: pieces of every tensor, from its first to its last.

So a base of which a part was drawn at random, or loaded into the wrong place, is not trained.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import Tensor

from launcher.errors import RecipeError
from launcher.model.lora import nf4_of
from launcher.model.weight_files import Headers, is_packed, listed, weights_of
from launcher.ops.nf4 import BLOCK, BLOCK2
from launcher.records.run import Verdict

PIECES = 8  # of BLOCK elements that are compared of each tensor

Stored = Callable[[str, list[int]], Tensor]  # a name and where the pieces begin -> the pieces in the file


def compare_with_files(model: Any, headers: Headers, missing: Iterable[str] = ()) -> Verdict:
    """Whether every weight of the files is where it belongs in the loaded model, by pieces of each from its first to
    its last: floats equal after the cast, NF4 weights within the quantiser's step, packed ones bit for bit.

    `missing`: names that the loader says it has not filled. Reads a few KiB of each tensor. Raises RecipeError where
    those of the files are not finite.
    """
    wrong, names = {*missing}, weights_of(headers)
    broken: dict[str, None] = {}  # in the order of the files
    with _opened(headers) as opened:

        def stored(name: str, starts: list[int]) -> Tensor:
            values = _stored(opened[headers[name].file].get_slice(name), starts)
            if values.is_floating_point() and not (is_packed(headers, name) or values.isfinite().all()):
                broken[name] = None
            return values

        wrong |= {name for name in names if not _is_in_place(model, name, headers, stored)}
    if broken:
        raise RecipeError(
            f"the weights of the base must be finite; {len(broken)} tensors of its files hold NaN or infinity among "
            f"the values compared: {listed(broken)}.\n"
            "The checkpoint was saved like this, or damaged since: name or save a sound one."
        )
    evidence = (
        f"{len(names) - len(wrong)} of {len(names)} tensors have the names, shapes and sampled values of the files"
    )
    return Verdict("base loaded whole", not wrong, evidence + (f"; not {listed(sorted(wrong))}" if wrong else ""))


def base_digest(headers: Headers) -> str:
    """A digest of the checkpoint's tensors, however they are spread over files: names, shapes and kinds, and of the
    values the pieces that are compared with a loaded model. Reads a few KiB of each tensor."""
    digest = hashlib.sha256()
    with _opened(headers) as opened:
        for name, (file, shape, dtype) in sorted(headers.items()):
            numel = torch.Size(shape).numel()
            whole = numel <= PIECES * BLOCK
            values = opened[file].get_tensor(name) if whole else _stored(opened[file].get_slice(name), _starts(numel))
            digest.update(repr((name, shape, dtype)).encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _opened(headers: Headers) -> Iterator[dict[str, Any]]:
    """The files of the checkpoint, open, by their paths."""
    with ExitStack() as stack:
        files = {header.file: None for header in headers.values()}
        yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}


def _is_in_place(model: Any, name: str, headers: Headers, stored: Stored) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    parameter = getattr(module, name.rpartition(".")[2])
    if not (isinstance(module, Linear4bit) and name.endswith(".weight")):
        starts = _starts(parameter.numel())
        return _equal(_loaded(parameter, starts), stored(name, starts).to(parameter.dtype))
    state = parameter.quant_state
    if state is None or tuple(state.shape) != (module.out_features, module.in_features):
        return False
    if not is_packed(headers, name):
        starts = _starts(state.shape.numel())
        return _within_a_step(module, starts, stored(name, starts).to(state.dtype).float())
    parts = {name: parameter, f"{name}.absmax": state.absmax}
    if state.nested:
        parts[f"{name}.nested_absmax"] = state.state2.absmax
    return all(_equal(_loaded(part, s), stored(key, s)) for key, part in parts.items() for s in [_starts(part.numel())])


def _starts(numel: int) -> list[int]:
    """Where the pieces of BLOCK elements begin."""
    last = max(1, numel // BLOCK) - 1
    return sorted({round(i * last / (PIECES - 1)) * BLOCK for i in range(PIECES)})


def _stored(piece: Any, starts: list[int]) -> Tensor:
    """The pieces of a tensor in a file, without reading the rest; [pieces * BLOCK], fewer of a smaller tensor."""
    shape = torch.Size(piece.get_shape())
    width = shape[1:].numel()
    parts = []
    for start in starts:
        stop = min(start + BLOCK, shape.numel())
        row = start // width
        parts.append(piece[row : -(-stop // width)].flatten()[start - row * width : stop - row * width])
    return torch.cat(parts)


def _loaded(tensor: Tensor, starts: list[int]) -> Tensor:
    """The pieces of a tensor of the model, on the CPU."""
    flat = tensor.detach().flatten()
    return torch.cat([flat[start : start + BLOCK] for start in starts]).cpu()


def _equal(loaded: Tensor, stored: Tensor) -> bool:
    """Bit for bit: packed weights that are stored as floats look like NaN."""
    return loaded.dtype == stored.dtype and torch.equal(loaded.view(torch.uint8), stored.view(torch.uint8))


def _within_a_step(linear: Linear4bit, starts: list[int], stored: Tensor) -> bool:
    """Whether values quantised to those of `linear`: each is at most half the widest gap of the code away, and as far
    as its block's scale may be off where scales are quantised too (ops/nf4.py has the formula)."""
    base = nf4_of(linear)
    blocks = torch.tensor(starts) // BLOCK
    pairs = torch.cat([base.packed.flatten()[s // 2 : (s + BLOCK) // 2] for s in starts]).cpu().long()
    values = base.code.cpu()[torch.stack([pairs >> 4, pairs & 15], 1).flatten()]
    scale, off = base.absmax[blocks.to(base.absmax.device)].cpu(), torch.zeros(len(starts))
    if base.absmax2 is not None and base.code2 is not None and base.offset is not None:
        code2, level2 = base.code2.cpu(), base.absmax2.cpu()[blocks // BLOCK2]
        scale = code2[scale.long()] * level2 + base.offset.cpu()
        off = level2 * _widest_gap(code2) / 2
    gap = _widest_gap(base.code.cpu()) / 2
    bound = (gap + 0.01) * scale.abs() + (1 + gap) * off
    each = stored.numel() // len(starts)
    error = (values[: stored.numel()] * scale.repeat_interleave(each) - stored).abs()
    return bool((error <= bound.repeat_interleave(each)).all())


def _widest_gap(code: Tensor) -> float:
    return float(code.sort().values.diff().max())
