import gc
import sys
import weakref

import pytest

from launcher.errors import RecipeError
from launcher.runtime.environment import quick_imports


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
