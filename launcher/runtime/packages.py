"""The packages that the launcher needs: which versions, and what to say of one that cannot be imported."""

import configparser
import importlib.metadata as metadata
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "qlora-launcher"
SETUP_CFG = Path(__file__).resolve().parents[2] / "setup.cfg"
IMPORT_NAMES = {"pyyaml": "yaml"}  # where it is not the package's own
# They decide what is computed:
COMPUTING = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "schedulefree")


def required_packages() -> dict[str, "Requirement"]:
    """What must be installed, by import name: from setup.cfg in a checkout, else as the installed package says."""
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser(comment_prefixes="#")
    setup.read(SETUP_CFG)
    if setup.get("metadata", "name", fallback="") == PROJECT:
        lines = setup["options"]["install_requires"].splitlines()
    else:
        lines = metadata.requires(PROJECT) or []
    every = [Requirement(line) for line in lines if line]
    needed = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {IMPORT_NAMES.get(one.name, one.name.replace("-", "_")): one for one in needed}


def unfit_packages() -> Iterator[tuple["Requirement", str]]:
    """The packages that are missing or of a version that is not supported, each with what was found."""
    for requirement in required_packages().values():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield requirement, "is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield requirement, f"is {version}"


def computing_versions() -> dict[str, str]:
    """The versions of Python and of each package of COMPUTING that is installed, by name."""
    found = {"python": platform.python_version()}
    for name in COMPUTING:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def import_failure(error: BaseException) -> str:
    """What to say of an import that failed: the package, what was found, and the command that mends it."""
    required = _required()
    name = _culprit(error, required)
    wanted = required.get(name, name)
    found = _found(name, getattr(wanted, "name", name))
    reason = " ".join(str(error).split())[:300]
    how = "--force-reinstall --no-deps " if found != "not installed" else ""
    remedy = f"pip install {how}'{wanted}'" if name else f"Install {PROJECT} again."
    return (
        f"every package that {PROJECT} needs must be importable; {name or 'one'} is not ({found}): "
        f"{type(error).__name__}: {reason}\n{remedy}"
    )


def _required() -> dict[str, "Requirement"]:
    """As `required_packages`; none where they cannot be told."""
    try:
        return required_packages()
    except (ImportError, metadata.PackageNotFoundError):
        return {}


def _found(name: str, package: str) -> str:
    try:
        return f"{metadata.version(package)} is installed"
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: no name
        return "installed without its metadata" if name in sys.modules else "not installed"


def _culprit(error: BaseException, required: dict[str, "Requirement"]) -> str:
    """The import name of the package to blame: the one that is missing, else the innermost required one in whose code
    the import failed, else the one that the error names, if it does."""
    named = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and named:
        return named
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [top for module in modules if (top := module.partition(".")[0]) in required]
    return inside[-1] if inside else named
