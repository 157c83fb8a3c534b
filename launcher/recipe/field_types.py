"""What the sections of a recipe are made of: their base class, types whose values are written in many ways, and where
the shipped recipes are.

Imports pydantic alone.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "name" or "owner/name", of a model or a dataset; a full match
HUB_TIMEOUT_S = 5.0  # for one small request to the hub, to see whether it answers
RULE = "rule"  # the type of an error between keys: its message is all there is to say


def switch(value: Any) -> Any:
    """YAML reads bare on/off/yes/no as booleans: give back the word, for choices and for fields that can be off."""
    word = str(value).lower() if isinstance(value, bool | str) else ""
    return "off" if word in ("off", "no", "false") else "on" if word in ("on", "yes", "true") else value


def off_is(replacement: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: replacement if switch(value) == "off" else value)


def number_before_path(value: Any) -> Any:
    """Text that reads as a number is one: '1.5' is a fraction out of range, not the path of a file."""
    text = re.sub(r"\.(?=(inf|nan)$)", "", value.strip().lower()) if isinstance(value, str) else value
    try:
        return float(text)
    except (TypeError, ValueError):
        return value


def distinct(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("an entry is given twice")
    return values


Choice = BeforeValidator(switch)
Distinct = AfterValidator(distinct)
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def recipes_dir() -> Path:
    """The folder of the shipped recipes: inside an installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: neither is there; the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    # Inside first: beside an installed package lies site-packages, where another project may have a `recipes`.
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "tiny.yaml").is_file():
            return folder
    raise FileNotFoundError(f"the shipped recipes are neither in {package} nor beside it: install the package again")
