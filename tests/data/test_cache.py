"""An entry of prepared data is read as it was saved or not at all; nothing that happens to the disk stops a run."""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from launcher.data import cache
from launcher.data.cache import Entry, fingerprint, load, save
from launcher.data.documents import Documents
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket
from launcher.data.pack.micro_batch import micro_batch_of
from launcher.recipe.data_section import DataSection, Source
from tests.support.documents import documents_of

NAME, OTHER = "a" * 40, "b" * 40
META = {"counts": {"rows_read": 4}, "examples": {"prompt": "é \ud800"}, "notes": ["one", None, 0.1]}
DAY_S = 86_400


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-launcher" / "data"


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.iterdir())


def make_entry(*, size: int = 4, validation: bool = True) -> Entry:
    documents = documents_of([size] * 3, supervised=np.arange(3 * size) % 2 == 1)
    train, validating = (bucket(documents, np.array(i), widths=(size,), pad_id=3) for i in ([0, 2], [1]))
    return Entry(train, validating if validation else None, META)


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal in every field, dtypes included."""
    for field in dataclasses.fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and np.array_equal(one, other), field.name
        elif dataclasses.is_dataclass(other):
            assert_equal(one, other)
        else:
            assert one == other, field.name


def loaded(name: str) -> Entry:
    entry = load(name)
    assert entry is not None
    return entry


@pytest.mark.parametrize("validation", [True, False])
def test_what_is_loaded_is_what_was_saved(folder, validation):
    entry = make_entry(validation=validation)
    assert load(NAME) is None
    assert save(entry, NAME) is None
    assert_equal(loaded(NAME), entry)
    batches = [micro_batch_of(blocks, [0, 1]) for blocks in (loaded(NAME).train, entry.train)]
    assert torch.equal(batches[0].labels, batches[1].labels) and batches[0].supervised_tokens > 0
    assert names(folder) == [NAME]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_loaded_arrays_are_read_only_and_both_parts_share_their_documents(folder):
    save(make_entry(), NAME)
    entry = loaded(NAME)
    assert entry.validation is not None and entry.validation.documents is entry.train.documents
    ids = entry.train.documents.input_ids
    assert type(ids) is np.ndarray and not ids.flags.writeable


def test_arrays_without_an_element_and_numbers_of_numpy_survive():
    nothing = Documents.of([])
    blocks = Blocks(nothing, np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.int64(3), 2, 16)
    assert save(Entry(blocks, None, {"rows": np.int64(7)}), NAME) is None
    assert loaded(NAME).meta == {"rows": 7} and len(loaded(NAME).train.documents) == 0
    assert type(loaded(NAME).train.pad_id) is int


def damages(content: bytes) -> Iterator[bytes]:
    """A file with one bit of every byte flipped, cut at every length, longer, or with another type of the same size."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        yield content[:place]
    yield content + content
    yield content.replace(b'"I32"', b'"F32"')


def test_damage_of_any_byte_is_noticed_and_the_entry_is_removed_and_made_anew(folder):
    save(make_entry(), NAME)
    content = file_of(folder, NAME).read_bytes()
    for number, damaged in enumerate(damages(content)):
        file_of(folder, NAME).write_bytes(damaged)
        assert load(NAME) is None, number
        assert names(folder) == [], number
    assert number > 1500
    assert save(make_entry(), NAME) is None
    assert_equal(loaded(NAME), make_entry())


@pytest.mark.parametrize(
    "put",
    [
        lambda path, other, elsewhere: shutil.copy(other, path),
        lambda path, other, elsewhere: path.write_text("{}"),
        lambda path, other, elsewhere: save_file({"documents.input_ids": np.zeros(4)}, path),
        lambda path, other, elsewhere: shutil.copytree(elsewhere, path),
        lambda path, other, elsewhere: path.symlink_to(elsewhere),
    ],
    ids=["another's", "text", "another safetensors file", "a folder", "a link"],
)
def test_what_is_not_this_entry_is_removed_and_nothing_beyond_it(folder, tmp_path, put):
    save(make_entry(), OTHER)
    path, elsewhere = file_of(folder, NAME), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    put(path, file_of(folder, OTHER), elsewhere)
    assert load(NAME) is None and not os.path.lexists(path)
    assert (elsewhere / "file").exists()
    assert_equal(loaded(OTHER), make_entry())


def test_writers_of_the_same_entry_at_once_leave_one_whole_entry(folder):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: save(make_entry(size=5000), NAME), range(16))) == [None] * 16
    assert names(folder) == [NAME]
    assert_equal(loaded(NAME), make_entry(size=5000))


def test_the_least_recently_used_entries_go_first_and_never_the_one_just_written(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 2)
    for age, name in ((300, NAME), (200, OTHER)):
        save(make_entry(), name)
        os.utime(file_of(folder, name), (time.time() - age,) * 2)
    loaded(NAME)  # now the most recently used
    save(make_entry(), "c" * 40)
    assert names(folder) == [NAME, "c" * 40]
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 1)
    os.utime(file_of(folder, NAME), (time.time() + 60,) * 2)
    save(make_entry(), "d" * 40)
    assert names(folder) == ["d" * 40]


def test_saving_clears_away_files_of_killed_writers_after_a_day_and_the_folders_of_earlier_versions(folder):
    save(make_entry(), NAME)
    for name, age in ((".killed", 2 * DAY_S), (".at-work", 60), ("a.lock", 2 * DAY_S)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / OTHER).mkdir()
    (folder / OTHER / "documents.input_ids.npy").touch()
    assert load(OTHER) is None
    save(make_entry(), OTHER)
    assert names(folder) == [".at-work", "a.lock", NAME, OTHER]
    assert_equal(loaded(OTHER), make_entry())


def test_a_full_disk_is_a_note_and_leaves_nothing(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        note = save(make_entry(), NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert note is not None and str(folder) in note and "File too large" in note
    assert note.endswith("the next run prepares the data again")
    assert names(folder) == [] and load(NAME) is None


def test_a_folder_that_cannot_be_had_is_a_note(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    note = save(make_entry(), NAME)
    assert note is not None and note.startswith("data cache /proc/nowhere/qlora-launcher/data cannot be written")
    assert load(NAME) is None


IDENTITIES = [["one", "two"], ["three"]]
SECTIONS: list[dict[str, Any]] = [
    {},
    {"sources": [{"path": "rows.jsonl", "format": "text"}]},
    {"sources": [{"path": "rows.jsonl", "weight": 2}]},
    {"streaming": True},
    {"template": "chatml"},
    {"batching": "padded"},
    {"max_length": 1024},
    {"loss_on": "all"},
    {"bad_rows": "skip"},
    {"unused": "drop"},
    {"max_row_mib": 1},
    {"too_long": "drop"},
    {"validation": 0.1},
    {"validation": "rows.jsonl"},
    {"validation": {"path": "rows.jsonl", "format": "text"}},
]


def name_of(tokenizer: Any, section: dict[str, Any] | None = None, **changes: Any) -> str:
    """The fingerprint with fields of the data section, or other arguments, changed."""
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}], "validation": 0.0, **(section or {})})
    return fingerprint(data, **{"identities": IDENTITIES, "tokenizer": tokenizer, "seed": 0, **changes})


def test_every_field_of_the_data_section_but_the_waiting_changes_the_fingerprint(tokenizer):
    assert {field for section in SECTIONS for field in section} | {"wait_s"} == set(DataSection.model_fields)
    assert len({name_of(tokenizer, section) for section in SECTIONS}) == len(SECTIONS)
    assert name_of(tokenizer, {"wait_s": 7}) == name_of(tokenizer)


def test_every_key_of_a_source_but_its_path_changes_the_fingerprint(tokenizer):
    keys: list[dict[str, Any]] = [{name: "text"} for name in ("config", "split", "revision", "format", "template")]
    keys += [{}, {"weight": 2}, {"columns": {"text": "a"}}, {"columns": {"text": "b"}}, {"delimiter": ";"}]
    keys += [{"template": "text", "completion": "a"}]
    assert {name for entry in keys for name in entry} | {"path"} == set(Source.model_fields)
    for field, wrap in (("sources", lambda source: [source]), ("validation", lambda source: source)):
        taken = [entry for entry in keys if field == "sources" or "weight" not in entry]  # validation has no weight
        names = {name_of(tokenizer, {field: wrap({"path": "rows.csv", **entry})}) for entry in taken}
        assert len(names) == len(taken)


def test_other_stop_tokens_are_other_data_since_they_end_turns(tokenizer):
    assert len({name_of(tokenizer, stop_ids=stops) for stops in ((), (1,), (1, 2))}) == 3
    assert name_of(tokenizer, stop_ids=(2, 1)) == name_of(tokenizer, stop_ids=(1, 2))


def test_the_content_of_sources_and_not_their_place_decides(tokenizer):
    for field, wrap in (("sources", lambda source: [source]), ("validation", lambda source: source)):
        sections = [{field: wrap({"path": path})} for path in ("rows.csv", "/else/where.csv")]
        assert name_of(tokenizer, sections[0]) == name_of(tokenizer, sections[1])
    assert name_of(tokenizer, {"validation": "rows.csv"}) == name_of(tokenizer, {"validation": "/else/where.csv"})
    others = [IDENTITIES, [["one"], ["two", "three"]], [["one", "two"], ["4"]], [["two", "one"], ["three"]]]
    assert len({name_of(tokenizer, identities=identities) for identities in others}) == len(others)


def test_the_tokenizer_the_template_and_the_seed_decide(tokenizer, make_tokenizer):
    with_word, with_pad = make_tokenizer("llama3"), make_tokenizer("llama3")
    with_word.add_tokens(["<new>"])
    with_pad.pad_token = "<|eot|>"
    all_names = [name_of(t) for t in (tokenizer, make_tokenizer("chatml"), with_word, with_pad)]
    assert len({*all_names, name_of(tokenizer, seed=1)}) == 5
    assert name_of(make_tokenizer("llama3")) == all_names[0]


def test_a_change_of_our_code_or_of_a_package_makes_older_entries_unfindable(tokenizer, monkeypatch, tmp_path):
    usual = name_of(tokenizer)
    package = tmp_path / "data"
    shutil.copytree(Path(cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    all_names = [name_of(tokenizer)]
    assert all_names == [usual]
    for file in (package / "pack" / "packing.py", package / "new" / "template.jinja"):
        file.parent.mkdir(exist_ok=True)
        with open(file, "a") as opened:
            opened.write("\n")
        all_names.append(name_of(tokenizer))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "version", lambda package: "0")
    all_names.append(name_of(tokenizer))
    assert len(set(all_names)) == 4


def test_the_fingerprint_is_the_same_in_another_process():
    script = (
        "from types import SimpleNamespace; from tokenizers import Tokenizer\n"
        "from launcher.data.cache import fingerprint; from launcher.recipe.field_types import recipes_dir\n"
        "from launcher.recipe.data_section import DataSection\n"
        "file = recipes_dir() / 'tiny' / 'base' / 'tokenizer.json'\n"
        "tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(str(file)), bos_token_id=0, eos_token_id=1,"
        " pad_token_id=None, all_special_ids=[0, 1], chat_template=None)\n"
        "print(fingerprint(DataSection(), identities=[['x']], tokenizer=tokenizer, seed=0))"
    )
    command, root = [sys.executable, "-c", script], str(Path(__file__).resolve().parents[2])
    environments = [{**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root} for seed in ("1", "2")]
    outputs = [subprocess.run(command, env=e, capture_output=True, text=True, check=True).stdout for e in environments]
    assert outputs[0] == outputs[1] and len(outputs[0].strip()) == 40
