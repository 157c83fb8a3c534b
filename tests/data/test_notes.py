"""What preparing says of files and keys that are left out, for preview and report."""

from launcher.data.prepare import prepare
from launcher.recipe.data_section import DataSection


def section(path, **options):
    return DataSection.model_validate({"sources": [{"path": path}], "max_length": 256, **options})


def test_the_files_of_a_folder_and_keys_that_nothing_uses_are_noted_also_from_the_cache(write, tokenizer, tmp_path):
    for name in ("train.jsonl", "test.jsonl", "LICENSE.txt"):
        write([{"text": f"river {n}", "id": n} for n in range(60)], name=name)
    data = section(str(tmp_path), validation=str(tmp_path))
    prepared = prepare(section(str(tmp_path), validation=0), tokenizer, seed=0)
    assert prepared.notes == (
        f"data: {tmp_path}: read train.jsonl; left out LICENSE.txt (about the data); test.jsonl (split test)",
        "data: nothing uses id (60 rows)",
    )
    (tmp_path / "LICENSE.txt").unlink()
    cached = prepare(section(str(tmp_path), validation=0), tokenizer, seed=0).notes
    assert cached[1:] == (f"data: {tmp_path}: read train.jsonl; left out test.jsonl (split test)", prepared.notes[1])
    write([{"text": "a lake", "id": 0}], name="test.jsonl")
    notes = prepare(data, tokenizer, seed=0).notes
    assert f"data: {tmp_path}: read test.jsonl; left out train.jsonl (split train)" in notes
    assert "data.validation: nothing uses id (1 row)" in notes
