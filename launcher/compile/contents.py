"""What is inside a graph that dynamo hands to the backend: its nodes, its opaque calls, and a digest of its program.

A graph may hold bodies of its own, as the forward and the backward of an autograd function. An operator may be opaque:
the compiler sees a call, and compiles neither its kernel nor, where it has a backward formula, the code of that. So a
digest of the outermost code alone would be equal for different programs.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule

from launcher.records.run import GraphRecord

COMPILED_NAMESPACES = ("aten", "prims", "prim")  # operators for which the compiler generates or chooses the code
OPAQUE_FUNCTIONS = (
    "scaled_dot_product_attention",
    "triton_kernel_wrapper_mutation",
    "triton_kernel_wrapper_functional",
)
COMPILERS = ("torch", "triton")  # packages whose callable objects are told by their names: they hold caches
HOST_READS = ("item", "tolist")  # traced without a graph break, but the host waits for the value


def contents(region: str, graph: GraphModule, example_inputs: list[Any]) -> GraphRecord:
    """What `graph` holds, nested bodies included."""
    bodies = [(name, body) for name, body in graph.named_modules() if isinstance(body, GraphModule)]
    nodes = [node for _, body in bodies for node in body.graph.nodes if node.op.startswith("call_")]
    opaque = Counter(name for node in nodes if (name := _opaque_name(node.target)))
    inputs = [
        f"{tuple(t.shape)}{t.stride()}{t.dtype}{t.device.type}{t.requires_grad}"
        if isinstance(t, torch.Tensor)
        else str(t)
        for t in example_inputs
    ]
    code = [f"{name}\n{without_device_index(body.code)}" for name, body in bodies]
    seen: dict[int, Any] = {}
    functions = [_text(function, seen) for node in nodes for function in _functions(node.target)]
    program = "\n".join([torch.__version__, *inputs, *code, *functions])
    return GraphRecord(region, len(nodes), dict(sorted(opaque.items())), hashlib.sha256(program.encode()).hexdigest())


def without_device_index(code: str) -> str:
    """Graph code with `cuda, index=1` and `cuda:1` replaced by `cuda`, since each rank names its own device."""
    return re.sub(r"(?<=')(cuda)(?:', index=\d+|:\d+')", r"\1'", code)


def _opaque_name(target: Any) -> str | None:
    """The name of an operator whose kernel the compiler does not see, or of a read by the host; None of any other."""
    if isinstance(target, OpOverload | OpOverloadPacket):
        namespace, name = str(target).split(".")[:2]
        return None if namespace in COMPILED_NAMESPACES else f"{namespace}.{name}"
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, str) and name in HOST_READS:
        return f"{name} (the host waits)"
    return name if name in OPAQUE_FUNCTIONS else None


def _functions(target: Any) -> Iterator[Any]:
    """The Python functions behind a call that graph code only names: the implementation and the backward formula of a
    custom operator, a function that is allowed in graphs, the two halves of an autograd function that is."""
    found: list[Any] = []
    if isinstance(target, OpOverload | OpOverloadPacket):
        definition = OPDEFS.get("::".join(str(target).split(".")[:2]))
        found = [getattr(definition, name, None) for name in ("_init_fn", "_backward_fn", "_setup_context_fn")]
    elif isinstance(target, MethodType) and isinstance(target.__self__, type):
        found = [getattr(target.__self__, name, None) for name in ("forward", "setup_context", "backward")]
    elif not getattr(target, "__module__", None) or not str(target.__module__).startswith("torch"):
        found = [target]
    yield from (function for function in found if callable(function))


def _text(value: Any, seen: dict[int, Any]) -> str:
    """What decides a function's result, as text without file, line or address. `seen`: the parts that have been told,
    by id; they are held there, so that no id is used twice."""
    if value is None or isinstance(value, int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return f"part {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(_text(part, seen) for part in _parts(value))})"


def _parts(value: Any) -> Sequence[Any]:
    """The parts that `_text` tells: none of objects that are not called, which may hold caches, ranks or addresses."""
    kind = type(value)
    if isinstance(value, CodeType):
        return value.co_name, value.co_code, value.co_names, value.co_consts
    if isinstance(value, FunctionType):
        defaults = value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items()))
        return value.__code__, *defaults, *map(_cell_contents, value.__closure__ or ())
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    if isinstance(value, tuple):
        return value
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if not callable(value) or isinstance(value, type) or kind.__module__.split(".")[0] in ("builtins", *COMPILERS):
        return [getattr(value, "__qualname__", getattr(value, "__name__", ""))]
    state = sorted(getattr(value, "__dict__", {}).items())
    return kind.__call__, *(
        item for item in state if isinstance(item[1], int | float | str | tuple | FunctionType | partial)
    )


def _cell_contents(cell: CellType) -> Any:
    """The value of a closure's variable; None where it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
