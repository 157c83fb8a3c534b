import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest

from launcher.runtime.quick_imports import quick_imports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_the_collector_rests_within_and_what_was_made_is_frozen():
    gc.unfreeze()
    with quick_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= len(made)


def test_garbage_of_before_is_not_kept_for_ever():
    class Link:
        pass

    gc.disable()
    link = Link()
    link.itself, found = link, weakref.ref(link)
    del link
    gc.enable()
    assert found() is not None
    with quick_imports():
        pass
    assert found() is None


def test_an_import_that_fails_leaves_the_collector_as_it_was():
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_transformers_takes_where_it_finds_it_is_hidden_within_and_there_afterwards(tmp_path):
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").write_text("print('scipy was imported')")
    script = """
import importlib.util
from launcher.runtime.quick_imports import quick_imports
with quick_imports():
    assert importlib.util.find_spec("scipy") is None
    from transformers import AutoModelForCausalLM
    from transformers.loss import loss_for_object_detection
print("transformers")
import scipy
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["transformers", "scipy was imported"], done.stderr


def test_a_module_that_is_there_already_stays():
    scipy = sys.modules.setdefault("scipy", ModuleType("scipy"))
    try:
        with quick_imports():
            assert sys.modules["scipy"] is scipy
        assert sys.modules["scipy"] is scipy
    finally:
        if getattr(scipy, "__file__", None) is None:
            del sys.modules["scipy"]
