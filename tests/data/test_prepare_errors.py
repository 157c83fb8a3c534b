"""Which data an error is about."""

from collections.abc import Callable

import pytest

from launcher.data.prepare import prepare
from launcher.data.read.rows import RowFault
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection

Write = Callable[..., str]
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def section(path, validation):
    return DataSection.model_validate({"sources": [{"path": path}], "max_length": 256, "validation": validation})


def test_an_error_in_validation_data_says_so_and_one_in_training_data_does_not(write, tokenizer):
    good, bad = write([CHAT] * 20), write([CHAT, {"messages": "Hi"}], name="bad.jsonl")
    empty, csv = write([{"text": " "}], name="empty.jsonl"), write([b"a;b"], name="bad.csv")
    for path, expected in (
        (bad, f"{bad}:2: "),
        (empty, f"{empty}: 0 usable rows"),
        (csv, f"{csv}: the cells"),
        ("./none.jsonl", "./none.jsonl: a source is"),
    ):
        for validation, sources, prefix in ((path, good, "data.validation: "), (0, path, "")):
            with pytest.raises(DataError) as caught:
                prepare(section(sources, validation), tokenizer, seed=0)
            assert str(caught.value).startswith(prefix + expected) and caught.value.code == 3
    with pytest.raises(RowFault):
        prepare(section(good, bad), tokenizer, seed=0)
