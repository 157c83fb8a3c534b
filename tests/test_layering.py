"""The house's rules, read from the syntax trees: imports run downward, files and functions are short."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.setup_cfg import EXTRAS, requirements

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60

RECIPE = {f"recipe.{name}" for name in ("schema", "data_section", "lora_section", "train_section", "train_options")}
BASE = {"records", "errors", "credentials", *RECIPE}  # imported from anywhere; they import nothing of ours
WORK = {"checkpoint", "data", "model", "ops", "compile", "memory", "runtime", *BASE}
ALLOWED = {  # package or module: what of ours it may import, itself and all it contains included
    "main": {"__main__"},
    "__main__": {"cli", "runtime"},
    "cli": {"api", "commands", "train", "preflight", "proof", "data", "model", "report", "recipe", "runtime"}
    | {"checkpoint.files", *BASE},
    "api": {"preflight", "train", "report", "recipe", "runtime", "checkpoint.run_files", "run_end"}
    | {"compile.inductor_cache", "export.card", "sinks", "trained_run", *BASE},
    "run_end": {"train", "report", "runtime", "checkpoint.run_files", "commands.past_run", "sinks", *BASE},
    "sinks": {"records", "errors", "runtime"},
    "trained_run": {"commands.finished_run", "export", "recipe", "runtime", *BASE},
    "commands": {"export", "preflight.before_torch", "report", "recipe", "runtime", *BASE}
    | {"data", "model", "memory", "ops", "checkpoint.files", "checkpoint.folder", "checkpoint.parts"},
    "export": {"train", "recipe.run_options", "recipe.hub_request", *WORK},
    "export.card": {"export.told_names", *BASE},
    "export.told_names": {"credentials", "recipe.field_types"},
    "preflight": {"train", "recipe", *WORK},
    "train": {*WORK, "recipe.field_types", "proof.start"},
    "proof": {"train", *WORK},
    "proof.start": {  # before the first step of a run
        "proof.stock",
        "proof.float32_stock",
        "proof.gate",
        "proof.first_difference",
        *WORK,
    },
    "proof.first_difference": {"proof.stock", "proof.float32_stock", *WORK},
    "proof.float32_stock": WORK,
    "proof.stock": WORK,
    "proof.gate": {"proof.difference", "proof.directions", *BASE},
    "proof.directions": BASE,
    "checkpoint": {"model", "recipe.field_types", *BASE},
    "model": {"ops", *BASE},
    "data": {"runtime", "recipe.field_types", "recipe.hub_request", *BASE},
    "compile": {"runtime", *BASE},
    "compile.explain": {"compile.causes", "records"},
    "compile.causes": set(),
    "memory": BASE,
    "ops": {"errors"},
    "runtime": BASE,
    "report": {"records", "credentials", "runtime.streams"},
    "report.pages": {"records"},  # know no medium
    "report.trackers": {"report.tracking_tools", "report.pages.formatting", "records", "errors", "credentials"},
    "report.tracking_tools": {"runtime.environment"},  # variables of the tools, for as long as the run lasts
    "recipe": {"errors", "credentials"},
    "recipe.schema": {
        "recipe.field_types",
        "recipe.data_section",
        "recipe.lora_section",
        "recipe.train_section",
        "recipe.proof_section",
    },
    "recipe.train_section": {"recipe.field_types", "recipe.train_options"},
    "recipe.train_options": {"recipe.field_types"},
    "recipe.proof_section": {"recipe.field_types"},
    "recipe.lora_section": {"recipe.field_types"},
    "recipe.data_section": {"recipe.field_types", "credentials"},
    "recipe.field_types": {"errors"},
    "recipe.hub_request": set(),
    "records": set(),
    "errors": {"credentials"},
    "credentials": set(),
}
OUTSIDE = {  # of other people's packages; not listed: any
    "ops": {"torch", "triton"},
    "report": {"rich"},
    "report.pages": set(),
    "recipe": {"huggingface_hub", "pydantic", "pydantic_core", "rich", "yaml"},
    "recipe.schema": {"pydantic"},
    "recipe.data_section": {"pydantic"},
    "recipe.train_section": {"pydantic"},
    "recipe.train_options": {"pydantic"},
    "recipe.proof_section": {"pydantic"},
    "recipe.lora_section": {"pydantic"},
    "recipe.field_types": {"pydantic", "pydantic_core"},
    "compile.explain": set(),  # reads past reports too, where there is no torch
    "compile.causes": set(),
    "report.trackers": set(),
    "report.tracking_tools": {"accelerate", "mlflow", "torch", "trackio", "wandb"},
    "main": set(),
    "__main__": set(),
    "start": set(),
    "runtime": {"accelerate", "filelock", "packaging", "psutil", "torch"},
    "train.request": set(),
    "records": set(),
    "errors": set(),
    "credentials": set(),
}
OPTIONAL = {"llama_cpp"}  # used where it is installed; it is built from source, for the machine that it runs on
IMPORT_NAMES = {"mlflow-skinny": "mlflow", "pyyaml": "yaml"}  # where it differs from the name in setup.cfg


def modules(package: Path) -> dict[str, Path]:
    """Dotted names within the package ("" is its __init__), and their files."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Every module that a file imports, inside functions too; a relative name begins with its dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole.removeprefix("launcher.") in known else base


def rule_of(name: str, rules: dict[str, set[str]]) -> str | None:
    """The most specific rule for a module: its own, else its package's."""
    parts = name.split(".")
    return next((rule for end in range(len(parts), 0, -1) if (rule := ".".join(parts[:end])) in rules), None)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def names_in_two_modules(package: Path) -> dict[str, list[str]]:
    """Public functions, classes and constants of one name that stand in several modules, with the modules."""
    places: dict[str, list[str]] = {}
    for module, path in modules(package).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            targets = [inner for target in targets for inner in getattr(target, "elts", [target])]
            names = [getattr(target, "id", getattr(target, "name", "_")) for target in targets]
            for name in names:
                if not name.startswith("_") and len(name) > 1 and not isinstance(node, ast.Import | ast.ImportFrom):
                    places.setdefault(name, []).append(module)
    return {name: found for name, found in places.items() if len(set(found)) > 1}


def test_a_name_stands_for_one_thing_in_the_whole_package(tmp_path: Path) -> None:
    assert names_in_two_modules(ROOT / "launcher") == {}
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("SIZE, _other = 1, 2\nclass Row: ...\ndef _own(): ...\n")
    assert names_in_two_modules(tmp_path) == {"SIZE": ["a", "b"], "Row": ["a", "b"]}


def layering_faults(package: Path) -> list[str]:
    """What breaks the import rules, "a imports b" each. A relative import always does: the rules name whole modules."""
    known, faults = modules(package), []
    for name, path in known.items():
        if not name:
            continue
        rule, outside = rule_of(name, ALLOWED), rule_of(name, OUTSIDE)
        if rule is None:
            faults.append(f"{name} is in no layer: add it to ALLOWED")
            continue
        for imported in imports(path, known):
            top, _, target = imported.partition(".")
            if top == "launcher":
                if target and not within(target, ALLOWED[rule] | {rule}):
                    faults.append(f"{name} imports {target}")
            elif not top or (outside and top not in OUTSIDE[outside] | sys.stdlib_module_names):
                faults.append(f"{name} imports {imported}")
    return faults


def cycle(package: Path) -> list[str]:
    """Modules that import each other in a circle, inside functions or not; none if there is no circle."""
    known = modules(package)
    imported = {name: {i.removeprefix("launcher.") for i in imports(path, known)} for name, path in known.items()}
    try:
        TopologicalSorter({name: names - {name} for name, names in imported.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def size_faults(folder: Path) -> list[str]:
    """Files over 300 lines and functions over 60."""
    faults = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            faults.append(f"{path.relative_to(folder)} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                faults.append(f"{path.relative_to(folder)}: {node.name} has {lines} lines")
    return faults


def dependencies() -> set[str]:
    """The import names of what setup.cfg requires, extras included."""
    names = {requirement.name for requirement in requirements(*EXTRAS)}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | {"triton"}


def name_faults(package: Path) -> list[str]:
    """Files and folders named after a package we depend on, a standard module, or nothing in particular."""
    taken = dependencies() | set(sys.stdlib_module_names) | {"utils", "helpers", "common"}
    own = {path.stem if path.is_file() else path.name for path in package.rglob("*") if "__pycache__" not in path.parts}
    return sorted(own & taken)


def undeclared(package: Path) -> list[str]:
    """Packages that are imported and not required in setup.cfg."""
    known = modules(package)
    imported = {i.partition(".")[0] for path in known.values() for i in imports(path, known)}
    return sorted(imported - dependencies() - sys.stdlib_module_names - OPTIONAL - {"launcher", "pydantic_core"})


def test_imports_run_downward_only() -> None:
    assert layering_faults(ROOT / "launcher") == []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert cycle(ROOT / "launcher") == []


@pytest.mark.parametrize("folder", ["launcher", "recipes", "tests"])
def test_files_and_functions_stay_short(folder: str) -> None:
    assert size_faults(ROOT / folder) == []


def test_no_file_is_named_after_a_dependency_or_a_standard_module() -> None:
    assert name_faults(ROOT / "launcher") == []


def test_every_package_that_is_imported_is_required() -> None:
    assert undeclared(ROOT / "launcher") == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("compile/plan.py", "from launcher.model import build", "compile.plan imports model.build"),
        ("compile/plan.py", "from launcher.model.build import build_model", "compile.plan imports model.build"),
        ("compile/plan.py", "from ..errors import RecipeError", "compile.plan imports ..errors"),
        ("compile/plan.py", "def f():\n    import launcher.model.build", "compile.plan imports model.build"),
        ("compile/plan.py", "from launcher.recipe.load import resolve", "compile.plan imports recipe.load"),
        ("data/pack/packing.py", "from launcher.train.loop import training", "data.pack.packing imports train.loop"),
        ("train/loop.py", "from launcher.report import summary", "train.loop imports report"),
        ("train/loop.py", "from launcher import cli", "train.loop imports cli"),
        ("ops/linear_ce.py", "import transformers.models", "ops.linear_ce imports transformers.models"),
        ("report/pages/run.py", "from rich.text import Text", "report.pages.run imports rich.text"),
        ("recipe/load.py", "def f():\n    import torch", "recipe.load imports torch"),
        ("recipe/schema.py", "from launcher.errors import RecipeError", "recipe.schema imports errors"),
        ("records/run.py", "import numpy", "records.run imports numpy"),
        ("errors.py", "from launcher.records import run", "errors imports records.run"),
        ("newroom/x.py", "", "newroom.x is in no layer: add it to ALLOWED"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    for name in ("cli.py", "records/run.py", "model/build.py", "train/loop.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert file.startswith("newroom") or layering_faults(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert fault in layering_faults(tmp_path)


def test_planted_cycles_sizes_names_and_packages_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from launcher import b\n")
    (tmp_path / "b.py").write_text("from launcher.a import f\n")
    assert set(cycle(tmp_path)) == {"a", "b"}
    (tmp_path / "long.py").write_text("x = 1\n" * 240 + "def g():\n" + "    x = 1\n" * 60)
    assert size_faults(tmp_path) == ["long.py has 301 lines", "long.py: g has 61 lines"]
    (tmp_path / "datasets").mkdir()
    for name in ("json.py", "rich.py", "utils.py"):
        (tmp_path / name).touch()
    assert name_faults(tmp_path) == ["datasets", "json", "rich", "utils"]
    (tmp_path / "c.py").write_text("import requests.sessions, torch\n")
    assert undeclared(tmp_path) == ["requests"]
