"""What Accelerate was asked for, where the launcher decides otherwise: a note, or an error where the two contradict.

Accelerate hands on most flags and its config file in ACCELERATE_* variables, which a user may also set. Some flags it
only obeys together with others and else drops, as --gradient_accumulation_steps: these are read from the command line
of the parent process. Imports no torch.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from launcher.errors import RecipeError
from launcher.recipe.schema import ModelSection
from launcher.recipe.train_section import TrainSection

VARIABLES = (  # names of flags, each with its variable
    "mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "dynamo_backend", "use_deepspeed",
    "use_fsdp", "use_megatron_lm", "use_parallelism_config",
)  # fmt: skip
OBEYED = {  # flags that start, place and watch processes
    "config_file", "cpu", "debug", "enable_cpu_affinity", "gpu_ids", "log_dir", "machine_rank", "main_process_ip",
    "main_process_port", "max_restarts", "module", "monitor_interval", "multi_gpu", "no_python", "num_machines",
    "num_processes", "quiet", "rdzv_backend", "rdzv_conf", "role", "same_network", "tee", "use_cpu",
}  # fmt: skip
LAUNCH_COMMANDS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")
INERT = ("", "no", "none", "false", "0", "default")  # values that ask for nothing, in lower case
STRATEGIES = ("use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config", "tpu")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def check_launch_flags(model: ModelSection, train: TrainSection, *, cores: int) -> tuple[str, ...]:
    """The notes on what Accelerate was asked for without effect. `cores` is this process's share of the machine's.

    Values are told only of flags that have a counterpart here: that of another may be a secret, and reports are shared.
    Raises RecipeError, for all at once, where it contradicts the recipe or what the launcher can do.
    """
    asked = {**_from_environment(), **_from_command(parent_command())}
    asked = {name: value for name, value in asked.items() if value.lower() not in INERT and name not in OBEYED}
    errors = [error for name, value in asked.items() if (error := _contradiction(name, value, model.dtype))]
    if errors:
        raise RecipeError("\n".join(errors))
    ours = {
        "mixed_precision": ("model.dtype", model.dtype),
        "gradient_accumulation_steps": ("train.accumulation", train.accumulation),
        "gradient_clipping": ("train.clip", train.clip),
        "num_cpu_threads_per_process": ("this process's share of the cores", cores),
    }
    return tuple(
        f"accelerate's {name}={value} has no effect: {ours[name][0]} decides, which is {ours[name][1]}"
        if name in ours
        else f"accelerate's {name} has no effect: no part of the launcher reads it"
        for name, value in asked.items()
        if name not in ours or PRECISIONS.get(value, value) != str(ours[name][1])
    )


def parent_command() -> list[str]:
    """The command line of the parent process; nothing where it cannot be read."""
    with suppress(OSError):
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    return []


def _from_environment() -> dict[str, str]:
    values = {name: os.environ.get(f"ACCELERATE_{name.upper()}") for name in VARIABLES}
    return {name: value for name, value in values.items() if value is not None}


def _from_command(words: Sequence[str]) -> dict[str, str]:
    """The flags of `accelerate launch ... script.py ...`; of another command none. A flag without a value is "true"."""
    starts = [n for n, word in enumerate(words) if Path(word).name in LAUNCH_COMMANDS]
    if not starts:
        return {}
    flags = {}
    for word, following in pairwise([*words[starts[0] + 1 :], ""]):
        if word.endswith(".py"):  # the script: what follows is its own
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            bare = not following or following.startswith("-") or following.endswith(".py")
            flags[name.replace("-", "_")] = value if equals else "true" if bare else following
    return flags


def _contradiction(name: str, value: str, dtype: str) -> str | None:
    """The message where the launcher cannot do what was asked, or the recipe asks for another thing."""
    asked = f"accelerate was asked for {name}={value}"
    if name in STRATEGIES:
        return (
            f"each process trains a whole model of its own; {asked}.\n"
            "Launch with a file of accelerate_configs/, or leave that out."
        )
    if name == "dynamo_backend":
        return f"the recipe decides what is compiled; {asked}.\nLeave it out: compile.mode and compile.backend decide."
    if name != "mixed_precision" or (value in PRECISIONS and dtype in ("auto", PRECISIONS[value])):
        return None
    remedy = f"Set model.dtype={PRECISIONS[value]}, or leave it out." if value in PRECISIONS else "Leave it out."
    return f"model.dtype decides the compute precision; it is {dtype}, and {asked}.\n{remedy}"
