"""The base class of a recipe's sections, the types of their fields, and the folder of the shipped recipes."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from launcher.errors import RecipeError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "name" or "owner/name", of a model or a dataset; a full match
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
INTERVAL = r"^([1-9]\d*[smh]|off)$"  # of train.save_every and run.timeout
INTERVAL_MEANING = "a time as 90s, 10m or 2h, or off"

Word = TypeVar("Word", bound=str)


class RecipeSection(BaseModel):
    """A part of a recipe. A rule between keys is a validator that raises ValueError with the whole message."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def interval_s(text: str) -> float | None:
    """Seconds of a time as "90s", "10m" or "2h"; None for "off"."""
    return None if text == "off" else int(text[:-1]) * UNITS_S[text[-1]]


def on_or_off(value: Any) -> Any:
    """The words on/yes/true and off/no/false, and the booleans that YAML reads them as, become "on" and "off"."""
    word = str(value).lower() if isinstance(value, bool | str) else ""
    return "off" if word in ("off", "no", "false") else "on" if word in ("on", "yes", "true") else value


def off_is(replacement: Any) -> BeforeValidator:
    """A field that can be switched off, and then holds `replacement`."""
    return BeforeValidator(lambda value: replacement if on_or_off(value) == "off" else value)


def dtype_name(value: Any) -> Any:
    """A short name of a dtype becomes PyTorch's: bf16 is bfloat16."""
    return SHORT_DTYPES.get(value, value) if isinstance(value, str) else value


def number_before_path(value: Any) -> Any:
    """Text that reads as a number becomes one: '1.5' is a fraction out of range, not the path of a file."""
    text = value.lower().replace(".inf", "inf").replace(".nan", "nan") if isinstance(value, str) else value
    with suppress(TypeError, ValueError):
        return float(text)
    return value


def refuse_repeats(values: list[Word]) -> list[Word]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("repeated", "an entry is given twice")
    return values


OnOff = BeforeValidator(on_or_off)
NonEmptyText = Annotated[str, Field(min_length=1)]
Distinct = Annotated[
    list[Word],
    AfterValidator(refuse_repeats),
    Field(json_schema_extra={"uniqueItems": True, "type": ["array", "string"]}),  # fields.py's as_list
]


def recipes_dir() -> Path:
    """The folder of the shipped recipes: inside an installed package, or beside it in a checkout.

    Raises:
        RecipeError: neither is there; the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    # Inside first: beside an installed package lies site-packages, where another project may have a `recipes`.
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "tiny.yaml").is_file():
            return folder
    raise RecipeError(f"the shipped recipes are neither in {package} nor beside it: install the package again")


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))
