"""What dynamo says when the contract breaks, what it means, and the remedy: the one table of them. Stdlib only.

`says` is searched in dynamo's words, and the first cause that fits holds. Its groups fill the braces of the other
texts; `name` is what a guard reads. docs/compile.md has the table for users, and a test explains each of its rows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`before` and `now` stand where dynamo's words lack them, and nothing has read the value."""

    says: str  # a regular expression
    means: str
    remedy: str
    before: str = ""
    now: str = ""


TENSOR = r"tensor '(?P<name>.+?)' "
WEIGHT = r"tensor '(?P<name>.*_parameters\[.+?)' "
REQUIRES = r"requires_grad mismatch\. expected (?P<before>requires_grad=\d)"
VALUES = r"expected (?P<before>[^,]+), actual (?P<now>.+?)(?:\. |$)"
STATE = "GLOBAL_STATE changed: .*?"  # a setting of torch's
EARLY = "Set it before warm-up, alike in all layers, and leave it."
ALWAYS = "Pass it in every call of the run, or in none."
EAGER = "Run it with compile.mode=off: it fails there as well, with its own traceback."

GUARDS = (
    Fault(WEIGHT + REQUIRES,
          "the weight {name} is trained in one layer or call and frozen in another",
          "Train or freeze it in all layers alike, before warm-up: requires_grad must not change."),
    Fault(WEIGHT + ".*?mismatch.*?" + VALUES,
          "the weight {name} was replaced or changed",
          "Resize, cast and move the model before warm-up, all layers alike."),
    Fault(TENSOR + REQUIRES,
          "the input {name} requires a gradient in one layer or call and not in another",
          "Let the input of every layer require a gradient: keep the hook on the embedding's output, detach nothing."),
    Fault(TENSOR + r"size mismatch at index (?P<index>0)\. " + VALUES,
          "a batch of {now} is not one of the planned {before} (dimension {index} of {name})",
          "Pad the last batch: each micro batch must hold train.micro_batch blocks. 1 is a size of its own, too."),
    Fault(TENSOR + r"size mismatch at index (?P<index>\d+)\. " + VALUES,
          "a length of {now} is not one of the planned {before} (dimension {index} of {name})",
          "Set data.batching=packed, or pad to a planned length."),
    Fault(TENSOR + r"dtype mismatch\. " + VALUES,
          "the input {name} has another dtype",
          "Cast it before the compiled code, always to the same dtype (model.dtype)."),
    Fault(r"(?:tensor '(?P<name>.+?)' dispatch key set|device index) mismatch\..*?xpected (?:DispatchKeySet\(|"
          r"device index to be )(?P<before>.+?)\)?, (?:actual DispatchKeySet\(|got )(?P<now>.+?)\)?$",
          "an input is on another device, or was made in inference_mode",
          "Make inputs on the run's device and outside torch.inference_mode."),
    Fault(TENSOR + r"(?:rank|stride) mismatch.*?" + VALUES,
          "the input {name} has another number of dimensions, or another order in memory",
          "Give it the same dimensions in every call, and call .contiguous() before the compiled code."),
    Fault(r"expected type of '(?P<name>.+?)' to be a tensor type, .*?found <class '(?P<now>.+?)'>",
          "{name} was a plain tensor and now is not", ALWAYS, before="a tensor"),
    Fault(r"^(?P<name>.+?) is (?P<before>None)\b", "{name} was absent and now is there", ALWAYS, now="a value"),
    Fault(r"^(?P<name>.+?) is not None\b", "{name} was there and now is absent", ALWAYS, "a value", "None"),
    Fault(r"^(?P<name>\S*\.training) == (?P<before>True|False)",
          "the module was switched between train() and eval()",
          "Keep the model in train() for the whole run: dropout of the launcher's layers follows the gradient mode."),
    Fault(r"^(?P<name>\S*layer_idx) == (?P<before>\d+)",
          "the code uses its layer's number, so that each layer needs a graph of its own",
          "Leave out what reads layer_idx, such as the KV cache: use_cache=False."),
    Fault(r"^(?P<name>len\(.+?\)) == (?P<before>\d+)",
          "a list or mapping has another number of items ({name})",
          "Fill it before warm-up and keep its length."),
    Fault(r"^(?P<name>\S+\.size\(\)\[\d+\]) == (?P<before>\S+\.size\(\)\[\d+\]|\d+)",
          "a dynamic size was taken for {before}, because the first input had both alike",
          "Let the first length differ from every other size, such as head_dim, or use mark_dynamic.",
          now="a size that differs"),
    Fault(r"^(?P<before>2) <= (?P<name>\S+\.size\(\)\[\d+\])",
          "a dynamic size became 1, which always needs a graph of its own",
          "Pad to at least 2, or leave the size static (dynamic=False).", now="1"),
    Fault(r"^(?P<name>G\['\w+'\].*?) == (?P<before>.+)",
          "the global variable {name} changed", EARLY),
    Fault(r"^___check_type_id\((?P<name>.+), \d+\)(?:, type=<class '(?P<before>.+?)'>)?",
          "{name} is an object of another type",
          "Replace modules and arguments before warm-up, with one type in every layer and call."),
    Fault(r"^___check_obj_id\((?P<name>.+), \d+\)",
          "{name} is another object, as a function that was replaced",
          "Replace functions and objects before warm-up, alike in every layer.", "the one of warm-up", "another one"),
    Fault(r"Duplicate tensors? found|^(?P<name>\w+) is (?!None|not)\w+$",
          "two inputs are one tensor in some calls and two in others",
          "Pass different tensors in every call, or the same one in every call."),
    Fault(r"^(?P<name>self\..+?) == (?P<before>.+)",
          "the attribute {name} differs between layers or calls", EARLY),
    Fault(r"^(?P<name>[\w.'\[\]]+) == (?P<before>.+)",
          "{name}, an argument or a variable around the function, has another value",
          "Keep it the same for the whole run, or pass it as a tensor."),
    Fault(STATE + "(?P<name>grad_mode)",
          "torch.no_grad or inference_mode is on in one call and off in another",
          "Evaluate as the launcher does, by graphs of warm-up (train.eval_every), or outside the compiled code."),
    Fault(STATE + r"(?P<name>autocast\S+)",
          "autocast was switched on, off or to another dtype",
          "Leave autocast out: model.dtype decides for the whole run."),
    Fault(STATE + "(?P<name>num_threads)",
          "the number of threads changed",
          "Leave it to the launcher, which sets it once, before the first graph."),
    Fault(STATE + r"(?P<name>deterministic_algorithms\w*)",
          "deterministic algorithms were switched on or off",
          "Set train.deterministic, and do not call torch.use_deterministic_algorithms during the run."),
    Fault(STATE + r"(?P<name>allow_\w+)",
          "the precision of matrix products changed",
          "Call torch.set_float32_matmul_precision once, before the run."),
    Fault(STATE + r"(?P<name>[\w()]+)|(?P<name2>___check_torch_function_mode_stack)",
          "a setting of torch changed, such as the default dtype or device ({name})", EARLY),
    Fault("for the first time after warm-up",
          "a function was compiled that warm-up had not called",
          "Call it in warm-up, or leave it uncompiled."),
)  # fmt: skip
BREAKS = (
    Fault("[Dd]ata.dependent|Dynamic shape operator",
          "the code decides by a tensor's values, which the compiler does not know",
          "Use torch.where or torch.clamp instead of if, or decide outside the compiled code."),
    Fault(r"Tensor\.(?P<name>item|tolist|numpy)\b",
          "the code reads a tensor's values on the host ({name})",
          "Keep the value a tensor, or read it outside the compiled code."),
    Fault(r"operator `(?P<name>print|open|input)`|(?P<name2>logging\.Logger)",
          "the code prints, logs or reads ({name})",
          "Move that line out of the compiled code."),
    Fault(r"`(?P<name>torch\._dynamo\.graph_break\(\))`|`(?P<name2>torch\.compiler\.disable)",
          "the code itself asks for a graph break ({name})",
          "Remove that call."),
    Fault("save_on_cpu|saved_tensors_hooks",
          "activations are moved to the host inside the compiled code",
          "Set memory.activations=offload, which does it outside the compiled layers."),
    Fault(r"requires_grad_\(\)",
          "the code calls requires_grad_() on its own tensors, as the hook of transformers' checkpointing does",
          "Call model.disable_input_require_grads(), or let the tensor require a gradient before the compiled code."),
    Fault("raised exception (?P<now>.+)", "the code raised an error while it was traced", EAGER),
    Fault(r"fake tensors: .*?: got (?P<now>\w+\(.*\))", "an operation does not accept its inputs", EAGER),
    Fault("trace generator|no compiled frames",
          "the compiler skipped the function: it is a generator, or its code is torch's own",
          "Compile a function that calls it, or take the region out with compile.scope=regions."),
    Fault(r"function `(?P<name>[^`]+)` should not be traced|builtin(?: operator)? `(?P<name2>[^`]+)`",
          "the code calls {name}, into which the compiler cannot see",
          "Take the call out of the compiled code, or make it a custom operator (torch.library.custom_op)."),
)  # fmt: skip
BACKENDS = (
    Fault(r"No working C\+\+|InvalidCxxCompiler|(?:compiler|\+\+|clang)\b.*(?:not found|No such file)",
          "the C++ compiler that Inductor needs is missing or does not work",
          "Install g++, or set CXX to a compiler that works; compile.backend=aot_eager needs none."),
    Fault("(?P<now>.+)",
          "the backend could not make code of the graph: {now}",
          "Try another compile.backend or compile.scope=regions."),
)  # fmt: skip
# Where another guard failed as well, this one tells less: it does for each graph of the other gradient mode.
LESS_TELLING_GUARDS = STATE
UNKNOWN = "no explanation known; dynamo's own words:"
LOOK_UP = "docs/compile.md, When it breaks, says how to find out."
