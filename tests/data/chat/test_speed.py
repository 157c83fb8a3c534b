"""Preparing costs what it should, counted in lines of code that are run: a busy machine does not matter."""

from transformers import AutoTokenizer

from launcher.data.prepare import prepare
from launcher.recipe.data_section import DataSection
from tests.conftest import TINY
from tests.support.counting import lines_run

LINES_A_ROW = 450  # 225 to 250 where this was written


def test_preparing_short_chats_costs_a_few_hundred_lines_a_row_and_loading_them_none(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    with open(TINY / "train.jsonl", encoding="utf-8") as shipped:
        rows = [next(shipped) for _ in range(800)]
    loaded = []
    for count in (200, 800):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(rows[:count]), encoding="utf-8")
        data = DataSection.model_validate({"sources": [{"path": str(file)}], "max_length": 2048})
        made = lines_run(lambda data=data: prepare(data, tokenizer, seed=0))
        assert 100 * count < made < LINES_A_ROW * count
        loaded.append(lines_run(lambda data=data: prepare(data, tokenizer, seed=0)))
    assert loaded[0] == loaded[1] < 1000
