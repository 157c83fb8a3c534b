"""Which packages are needed, and what is said of one that cannot be imported."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from launcher.errors import RecipeError
from launcher.runtime import packages
from launcher.runtime.environment import quick_imports
from launcher.runtime.packages import import_failure, required_packages, unfit_packages


def test_what_is_required_is_read_from_setup_cfg_or_from_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_checkout = required_packages()
    assert {"torch", "yaml", "huggingface_hub"} <= in_checkout.keys() and "pytest" not in in_checkout
    monkeypatch.setattr(packages, "SETUP_CFG", tmp_path / "none.cfg")
    lines = ["torch>=2.11,<2.16", "pyyaml>=6", "tensorboard; extra == 'trackers'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines if name == "qlora-launcher" else None)
    assert required_packages() == {"torch": Requirement(lines[0]), "yaml": Requirement(lines[1])}


@pytest.mark.parametrize(
    ("version", "unfit"),
    [("2.10.0", True), ("2.11.0", False), ("2.13.0+cu130", False), ("2.15.1.dev20261101", False), ("2.16.0", True)],
)
def test_a_version_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch, version: str, unfit: bool) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else original(name))
    assert [(one.name, found) for one, found in unfit_packages()] == [("torch", f"is {version}")] * unfit


def raised_in(module: str, error: BaseException) -> BaseException:
    """The error, raised by code of this module."""
    scope: dict[str, Any] = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", scope)
    with pytest.raises(type(error)) as caught:
        scope["fail"]()
    return caught.value


MISSING = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
INCOMPLETE = ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x")
OTHER_VERSION = ImportError("cannot import name 'x' from 'peft'", name="peft")
NOT_LOADED = OSError("libcudart.so.13: cannot open shared object file")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MISSING, r"nowhere is not \(not installed\).*\npip install 'nowhere'"),
        (INCOMPLETE, r"yaml is not \([\d.]+ is installed\).*'pyyaml>=6'"),
        (OTHER_VERSION, r"peft is not \([\d.]+ is installed\).*--force-reinstall"),
        (NOT_LOADED, r"bitsandbytes is not .* OSError: libcudart.*'bitsandbytes>=0.50'"),
        (ImportError(""), r"one is not .*\nInstall qlora-launcher again"),
    ],
)
def test_the_message_names_the_package_what_was_found_and_the_command(error: BaseException, says: str) -> None:
    module = "bitsandbytes.cextension" if isinstance(error, OSError) else "somewhere"
    assert re.search(says, import_failure(raised_in(module, error)), re.DOTALL)


def test_an_error_of_our_own_is_no_failed_import() -> None:
    with pytest.raises(ValueError, match="ours"), quick_imports():
        raise raised_in("launcher.train.loop", ValueError("ours"))
    with pytest.raises(RecipeError, match="numpy is not"), quick_imports():
        raise raised_in("numpy.core", ValueError("numpy.dtype size changed"))
