"""What the schema says of a dotted key, in words: what it accepts, an example, and the nearest key to a mistyped one.

All of it is read from schema.py; only the names that other trainers use for our keys are listed here.
"""

import re
import shlex
from collections.abc import Iterable
from functools import cache
from typing import Any

from launcher.recipe.command_line import OPTIONS, bare, closest
from launcher.recipe.schema import Recipe
from launcher.recipe.yaml_lines import inline

Json = dict[str, Any]

OTHER_NAMES = {  # another trainer's name: our key
    "learning_rate": "train.lr",
    "max_seq_length": "data.max_length",
    "packing": "data.batching",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "batch": "train.micro_batch",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler_kwargs": "train.schedule_options",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "optim_args": "train.optimizer_options",
    "adam_beta1": "train.optimizer_options",
    "adam_beta2": "train.optimizer_options",
    "adam_epsilon": "train.optimizer_options",
    "max_grad_norm": "train.clip",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "rank": "lora.r",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "layers_to_transform": "lora.layers",
    "init_lora_weights": "lora.init",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "trainable_token_indices": "lora.trainable_tokens",
    "neftune_noise_alpha": "train.neftune_alpha",
    "dataset": "data.sources",
    "seq_len": "data.max_length",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "attn_implementation": "model.attention",
    "load_in_4bit": "quant.type",
    "gradient_checkpointing": "memory.activations",
    "report_to": "run.trackers",
}


@cache
def json_schema() -> Json:
    """The JSON schema of a recipe (draft 2020-12)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def field(key: str) -> Json:
    """The JSON schema of one key, `data.sources[0].path` included; of the recipe for "". KeyError if there is none."""
    schema = json_schema()
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", key):
        schema = _follow(schema["items"] if part.startswith("[") else schema["properties"][part])
    return schema


def _follow(schema: Json) -> Json:
    reference = schema.get("$ref")
    return json_schema()["$defs"][reference.rsplit("/", 1)[1]] | schema if reference else schema


def names_in(key: str) -> tuple[str, ...]:
    """The names of the keys in a section, in an entry of a list or, for "", in the recipe; none in anything else."""
    try:
        return tuple(field(key).get("properties", ()))
    except KeyError:
        return ()


SECTIONS = names_in("")
LEAVES = tuple(f"{section}.{name}" for section in SECTIONS for name in names_in(section))
GROUPS = tuple(g for s in SECTIONS for g in ((s, "data.sources[0]") if s == "data" else (s,)))  # all that have keys


def as_list(key: str, value: Any) -> Any:
    """A value as its key holds it: where that is a list, a text is its entries with commas between, an entry alone is
    the only one, and of an entry with a path the path alone will do."""
    schema = field(key)
    if "array" not in schema.get("type", ()):
        return value
    entries = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    entries = [entries] if isinstance(entries, dict) else entries
    if isinstance(entries, list) and "properties" in _follow(schema["items"]):
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
    return entries


def shown_default(key: str) -> str:
    """The default of a key as a command line gives it; what it is, in brackets, where it is no plain value."""
    schema = field(key)
    if "default" in schema:
        return inline(schema["default"])
    return "(the shipped set)" if key == "data.sources" else "(required)"


def accepts(key: str) -> str:
    """What a key accepts, in words: `a whole number from 1 to 1024`."""
    return in_words(field(key))


def in_words(schema: Json) -> str:
    """What the JSON schema of a value accepts: `a whole number from 1 to 1024`."""
    schema = _follow(schema)
    if "anyOf" in schema:
        return ", or ".join(branch.get("description") or in_words(branch) for branch in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    match schema["type"] if isinstance(schema["type"], str) else schema["type"][0]:
        case "array":
            minimum = f", at least {schema['minItems']}" if "minItems" in schema else ""
            return f"a list of {in_words(schema['items'])}{minimum}" + (
                ", each once" if "uniqueItems" in schema else ""
            )
        case "object" if "properties" not in schema:
            return f"a mapping of text to {in_words(schema['additionalProperties'])}"
        case "object":
            return "{" + ", ".join(schema.get("properties", ("name: name",))) + "}"
        case "integer":
            return f"a whole number{_range(schema)}"
        case "number":
            return f"a number{_range(schema)}"
        case kind:
            return {"string": "text", "boolean": "true or false", "null": "null"}[kind]


def _range(schema: Json) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    return " " + " and ".join(bounds) if bounds else ""


def example(key: str) -> Any:
    """A value that a key accepts: the default, else the schema's example."""
    schema = field(key)
    default = schema.get("default")
    return default if default or "examples" not in schema else schema["examples"][0]


def assignment(key: str, value: Any) -> str:
    """`key=value`, quoted for the shell."""
    return shlex.quote(f"{key}={inline(value)}")


def unknown(key: str, value: Any, got: str) -> str:
    """The error for a key that does not exist: the nearest key and what that accepts, else the keys there are."""
    word = key.removeprefix("--")
    if word != key and word not in (*SECTIONS, *OTHER_NAMES) and (option := closest(word, OPTIONS, 0.75)):
        remedy = f"write {assignment(option, value)}"
    elif near := nearest(key):
        remedy = f"did you mean {near}{'' if near in SECTIONS else f' ({accepts(near)})'}?"
    else:
        parent = key.rpartition(".")[0]
        parent = parent if names_in(parent) else ""
        remedy = f"{parent or 'a recipe'} has {', '.join(names_in(parent))}"
    return f"unknown key {bare(key)}; {got}; {remedy}"


def nearest(key: str) -> str | None:
    """The existing key that a mistyped one most likely stands for, by spelling or by another trainer's name."""
    parent, _, name = key.rpartition(".")
    if parent.endswith("]") and names_in(parent):
        near = _closest_key(name, names_in(parent))
        return f"{parent}.{near}" if near else None
    plain = key.lstrip("+-~").replace("-", "_").lower()
    leaf = ".".join(re.split(r"[.\[]", plain)[:2])
    if leaf in LEAVES:
        return leaf  # an index into a list, or a key below a value
    section, _, name = plain.rpartition(".")
    everywhere = {leaf.replace(".", "_"): leaf for leaf in LEAVES}  # lora_alpha
    everywhere |= {leaf.split(".")[1]: leaf for leaf in reversed(LEAVES)} | OTHER_NAMES
    if section:
        section = closest(section, SECTIONS) or section
        nearby = {word: leaf for word, leaf in everywhere.items() if leaf.startswith(f"{section}.")}
    else:
        nearby = everywhere | {word: word for word in SECTIONS}
    # The exact name in another section is more likely meant than a similar name in the section that was written.
    for names, likeness in ((nearby, 1.0), (everywhere, 1.0), (nearby, 0.6), (everywhere, 0.75)):
        if near := _closest_key(name, names, likeness):
            return names[near]
    return None


def _closest_key(word: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The name most like `word` of those that differ in spelling, not in a word: save_every is no eval_every."""

    def misspells(name: str) -> bool:
        parts = re.split("[_.]", name)
        return all(closest(part, parts) for part in word.split("_")) or name.replace("_", "") == word.replace("_", "")

    return closest(word, filter(misspells, names), likeness)
