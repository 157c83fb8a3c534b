"""Reads the values that dynamo's guards speak of, while it compiles again: its words have only the old ones.

Nothing here may fail a compilation: what cannot be read stays unknown. Dynamo's own frame is found on the stack, or in
the traceback of its error, by its name; a torch that calls it otherwise leaves the values untold.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from traceback import walk_stack, walk_tb
from typing import Any

import torch
import torch._dynamo
from torch._guards import CompileContext

from launcher.compile.explain import GuardValues, changed_settings, names

SETTINGS: dict[str, Callable[[], object]] = {  # by dynamo's name
    "grad_mode": torch.is_grad_enabled,
    "num_threads": torch.get_num_threads,
    "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "allow_tf32": torch.get_float32_matmul_precision,
    "default_dtype": torch.get_default_dtype,
    "autocast(cpu)_enabled": lambda: torch.is_autocast_enabled("cpu"),
    "autocast(cuda)_enabled": lambda: torch.is_autocast_enabled("cuda"),
}
COMPILES = "_compile"  # dynamo's function. Its `frame` is not used: after an error that points to freed memory

_settings: dict[str, dict[str, str]] = {}  # by compile id, while a graph was compiled
_recompiles: dict[
    str, tuple[str, GuardValues, str]
] = {}  # by compile id: guards that failed, their values, the function


def begin() -> None:
    """Forget what was seen, and see every recompile from now on."""
    _settings.clear()
    _recompiles.clear()
    with suppress(AttributeError):  # of a torch without this hook
        if _see_recompile not in (torch._dynamo.utils.get_hook_for_recompile_user_context() or []):
            torch._dynamo.utils.register_hook_for_recompile_user_context(_see_recompile)


def see_graph() -> None:
    """Called while a graph is compiled."""
    _settings[str(CompileContext.current_compile_id())] = _settings_now()


def recompile(compile_id: object) -> tuple[str, GuardValues, str] | None:
    """The guards that failed before this compilation, in dynamo's words, their values, "FILE:LINE" of the function."""
    return _recompiles.get(str(compile_id))


def values_at(error: BaseException) -> GuardValues:
    """The values at an error of dynamo's. Settings that a context manager had made are gone by then."""
    with suppress(Exception):
        return next(
            _values(str(error), frame.f_locals)
            for frame, _ in walk_tb(error.__traceback__)
            if frame.f_code.co_name == COMPILES
        )
    return {}


def _see_recompile() -> str:
    """Dynamo calls this at every compilation, and stores what it returns beside its own figures."""
    with suppress(Exception):
        variables = next(f.f_locals for f, _ in walk_stack(sys._getframe()) if f.f_code.co_name == COMPILES)
        if reasons := variables.get("reasons"):
            raw = "\n".join(reasons)
            where = f"{variables['code'].co_filename}:{variables['code'].co_firstlineno}"
            _recompiles[str(CompileContext.current_compile_id())] = raw, _values(raw, variables), where
    return ""


def _values(raw: str, variables: Mapping[str, Any]) -> GuardValues:
    around, own = variables["globals"], variables["locals"]
    scope = {**around, **own, "G": around, "L": own}
    values = {name: ("", _read(name, scope)) for name in names(raw)}
    settings = _settings_now()
    for graph, name in changed_settings(raw):
        values[name] = (_settings.get(graph, {}).get(name, ""), settings.get(name, ""))
    return values


def _settings_now() -> dict[str, str]:
    readings = {}
    for name, read in SETTINGS.items():
        with suppress(Exception):
            value = read()
            readings[name] = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return readings


def _read(expression: str, scope: Mapping[str, Any]) -> str:
    """The value of an expression of names, attributes, keys and len(), described; "" if it has none."""
    with suppress(Exception):
        value = _evaluated(ast.parse(expression, mode="eval").body, scope)
        if isinstance(value, torch.Tensor):
            return f"a tensor of shape {tuple(value.shape)}"
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return ""


def _evaluated(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return scope[name]
        case ast.Attribute(value=inner, attr=name):
            return getattr(_evaluated(inner, scope), name)
        case ast.Subscript(value=inner, slice=ast.Constant(value=key)):
            return _evaluated(inner, scope)[key]
        case ast.Call(func=ast.Name(id="len"), args=[inner]):
            return len(_evaluated(inner, scope))
    raise ValueError(f"not read: {ast.dump(node)}")
