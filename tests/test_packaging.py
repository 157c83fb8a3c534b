"""What `pip install .` and `pip install -e .` put on a machine: the package, the recipes, the command."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.support.setup_cfg import EXTRAS, SETUP, requirements

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
# With -S, and the environment's packages appended as plain folders, whose .pth files are not read: an editable install
# in the environment of the tests would hide the one under test.
FIND = (
    "import site, sys; site.addsitedir(sys.argv[1]); sys.path += sys.argv[2:]; "
    "from launcher.recipe import load; print(load.recipes_dir())"
)
PACKAGES = [entry for entry in sys.path if entry.endswith("site-packages")]
SHIPPED = [
    path.relative_to(ROOT / "recipes").as_posix()
    for path in (ROOT / "recipes").rglob("*")
    if path.is_file() and not {"__pycache__", "build"} & set(path.parts)  # neither is in the repository
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that no build folder is left in the repository."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in ("launcher", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(checkout: Path, hook: str) -> Path:
    """Build a wheel as pip would (`hook` is one of PEP 517's) and unpack it where a site-packages would be."""
    target = checkout.parent / hook
    built = run("-c", BUILD, hook, str(checkout.parent), cwd=checkout).splitlines()[-1]
    with zipfile.ZipFile(checkout.parent / built) as wheel:
        wheel.extractall(target)
    return target


def run(*arguments: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_plain_install_carries_every_recipe_file_and_finds_them(checkout: Path, tmp_path: Path) -> None:
    installed = install(checkout, "build_wheel")
    packed = [path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()]
    assert len(SHIPPED) > 10
    assert {f"launcher/recipes/{name}" for name in SHIPPED} == {
        name for name in packed if name.startswith("launcher/recipes/")
    }
    assert {"launcher/report/page.css", "launcher/report/page.js"} <= set(packed)
    assert not [name for name in packed if name.startswith(("recipes/", "tests/"))]
    # Run elsewhere, with a stranger's `recipes` beside the package, as site-packages may have one.
    (installed / "recipes").mkdir()
    (installed / "recipes" / "tiny.yaml").touch()
    assert run("-S", "-c", FIND, str(installed), *PACKAGES, cwd=tmp_path) == str(installed / "launcher" / "recipes")
    entry_points = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "qlora-launcher = launcher.__main__:start" in entry_points


@pytest.mark.slow
def test_an_editable_install_finds_the_recipes_of_the_checkout(checkout: Path, tmp_path: Path) -> None:
    installed = install(checkout, "build_editable")
    assert not (installed / "launcher").exists()
    assert run("-S", "-c", FIND, str(installed), *PACKAGES, cwd=tmp_path) == str(checkout / "recipes")


def test_every_package_of_the_tree_is_listed() -> None:
    listed = SETUP["options"]["packages"].split()
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "launcher").rglob("__init__.py")}
    assert set(listed) == found | {"launcher.recipes"}


def test_the_constraints_pin_everything_that_is_needed_and_nothing_of_a_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines), lines
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    todo, needed = requirements("test"), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in needed and applies(requirement):
            needed.add(name)
            todo += map(Requirement, distribution(name).requires or [])
    assert len(needed) > 40
    # Of the other extras what they name: a package that the tests' environment lacks does not tell here what it needs.
    needed |= {canonicalize_name(requirement.name) for requirement in requirements(*EXTRAS)}
    assert needed <= pinned, sorted(needed - pinned)


def applies(requirement: Requirement) -> bool:
    """Whether a requirement holds here and without extras. What torch needs for CUDA differs by index: not pinned."""
    pinnable = not canonicalize_name(requirement.name).startswith(("nvidia-", "cuda-", "triton"))
    return pinnable and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))


def test_both_entry_scripts_work_from_any_folder_and_hide_no_package(tmp_path: Path) -> None:
    main = str(ROOT / "launcher" / "main.py")
    assert run(main, "recipe=list", cwd=tmp_path) == run("-m", "launcher", "recipe=list", cwd=ROOT)
    code = f"import runpy, sys; sys.argv = [{main!r}, 'recipe=list']\n"
    code += f"sys.path.insert(0, {str(ROOT / 'launcher')!r})\n"  # as Python itself does for a script
    code += f"try: runpy.run_path({main!r}, run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
    code += f"assert sys.path[0] == {str(ROOT)!r} and {str(ROOT / 'launcher')!r} not in sys.path\n"
    run("-c", code, cwd=tmp_path)
