import gc
import os
import sys
import weakref

import pytest

from launcher.errors import RecipeError
from launcher.runtime.environment import environment_put_back, quick_imports, set_for_run


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """As in a process that has not imported torch."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_and_what_was_imported_is_frozen_even_where_an_import_fails(enabled):
    gc.unfreeze()
    gc.enable() if enabled else gc.disable()
    with pytest.raises(RecipeError, match="must be importable"), quick_imports():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]
        raise ImportError
    assert gc.isenabled() == enabled
    assert gc.get_freeze_count() >= len(imported)


def test_garbage_of_before_is_not_frozen():
    class Node:
        pass

    gc.disable()
    node = Node()
    node.itself, reference = node, weakref.ref(node)
    del node
    assert reference() is not None
    with quick_imports():
        pass
    assert reference() is None


def test_in_a_process_that_has_torch_nothing_is_frozen(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    gc.unfreeze()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_variable_that_a_run_sets_is_taken_back_and_one_of_the_users_stays(monkeypatch, fails):
    for name in ("BEFORE", "WHILE", "TAKEN_OVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USERS", "theirs")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), environment_put_back() as prepared:
        os.environ["BEFORE"] = "1"
        fails or prepared()
        for name in ("WHILE", "TAKEN_OVER", "USERS"):
            set_for_run(name, "ours")
        assert (os.environ["WHILE"], os.environ["USERS"]) == ("ours", "theirs")
        os.environ["TAKEN_OVER"] = "somebody's"
        raise ZeroDivisionError
    assert os.environ.pop("TAKEN_OVER") == "somebody's" or fails
    assert dict(os.environ) == before
