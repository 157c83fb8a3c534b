"""What the schema says about a dotted key: its meaning, what it accepts, an example, and the key that was meant.

Everything is read from schema.py; only the names that other trainers use for our keys stand here.
"""

import difflib
import re
from functools import cache
from typing import Any

from launcher.recipe.field_types import Section
from launcher.recipe.schema import Recipe

Json = dict[str, Any]

OTHER_NAMES = {  # what other trainers call it: what we call it
    "learning_rate": "train.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "batch": "train.micro_batch",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "max_grad_norm": "train.clip",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "dataset": "data.sources",
    "max_seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "load_in_4bit": "quant.type",
    "report_to": "run.trackers",
}


def section_of(name: str) -> type[Section]:
    """The model class of a section."""
    section = Recipe.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    return section


SECTIONS = tuple(Recipe.model_fields)
LEAVES = tuple(f"{section}.{key}" for section in SECTIONS for key in section_of(section).model_fields)


@cache
def json_schema() -> Json:
    """The JSON schema of a recipe (draft 2020-12), for editors and for the texts below."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def field(key: str) -> Json:
    """The JSON schema of one key, `data.sources[0].path` included. KeyError if there is none."""
    found = json_schema()
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", key):
        found = found["items"] if part.startswith("[") else found["properties"][part]
        found = _follow(found)
    return found


def _follow(found: Json) -> Json:
    reference = found.get("$ref")
    return json_schema()["$defs"][reference.rsplit("/", 1)[1]] | found if reference else found


def accepts(key: str) -> str:
    """What a key accepts, in words: `a whole number from 1 to 1024`."""
    return _words(field(key))


def _words(found: Json) -> str:
    found = _follow(found)
    if options := found.get("anyOf"):
        return ", or ".join(_words(option) for option in options)
    if choices := found.get("enum", [found["const"]] if "const" in found else None):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    match found["type"]:
        case "array":
            least = f", at least {found['minItems']}" if "minItems" in found else ""
            return f"a list of {_words(found['items'])}{least}" + (", each once" if "uniqueItems" in found else "")
        case "object":
            return "{" + ", ".join(found["properties"]) + "}"
        case "integer":
            return f"a whole number{_range(found)}"
        case "number":
            return f"a number{_range(found)}"
        case kind:
            return {"string": "text", "boolean": "true or false", "null": "null"}[kind]


def _range(found: Json) -> str:
    if "minimum" in found and "maximum" in found:
        return f" from {found['minimum']} to {found['maximum']}"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    stated = [f"{sign} {found[bound]:g}" for bound, sign in bounds.items() if bound in found]
    return " " + " and ".join(stated) if stated else ""


def example(key: str) -> Any:
    """A value that the key accepts: its default, else the schema's example."""
    found = field(key)
    default = found.get("default")
    return found["examples"][0] if default in (None, []) and "examples" in found else default


def siblings(key: str) -> str:
    """What there is where an unknown key was looked for: `train has steps, epochs, ...`."""
    parent = key.rpartition(".")[0]
    try:
        names = field(parent)["properties"]
    except KeyError:
        parent, names = "", json_schema()["properties"]
    return f"{parent or 'a recipe'} has {', '.join(names)}"


def nearest(key: str) -> str | None:
    """The key that was most likely meant by an unknown one, by spelling or by another trainer's name for it."""
    item = re.fullmatch(r"(.+)\[\d+\]\.([^.\[\]]+)", key)
    if item and item[1] in LEAVES:
        close = difflib.get_close_matches(item[2], field(f"{item[1]}[0]").get("properties", ()), n=1)
        return key[: item.start(2)] + close[0] if close else None
    plain = key.lstrip("+-~").replace("-", "_").lower()
    for leaf in LEAVES:
        if re.match(re.escape(leaf) + r"(\.|\[)", plain):
            return leaf  # an index into a list or a key below a value
    return _nearest(plain)


def _nearest(plain: str) -> str | None:
    looked_in, _, name = plain.rpartition(".")
    section = next(iter(difflib.get_close_matches(looked_in, SECTIONS, n=1)), None)
    everywhere = {leaf.split(".")[1]: leaf for leaf in reversed(LEAVES)} | OTHER_NAMES
    here = {word: leaf for word, leaf in everywhere.items() if section == leaf.split(".")[0]}
    if not looked_in:
        here = everywhere | {name: name for name in SECTIONS}
    # The name as it stands, wherever it belongs, goes before a similar one of the section that was looked in.
    for names, likeness in ((here, 1.0), (everywhere, 1.0), (here, 0.6), (everywhere, 0.75)):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=likeness):
            return names[close[0]]
    return None
