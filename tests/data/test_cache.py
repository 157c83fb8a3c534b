"""Entries of prepared data survive as they are or count as absent; nothing that happens to the disk stops a run."""

import dataclasses
import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import cache
from launcher.data.cache import Entry, fingerprint, load, save
from launcher.data.documents import Document, Documents
from launcher.data.pack.blocks import Blocks
from launcher.recipe.data_section import DataSection

NAME, OTHER = "a" * 40, "b" * 40
META = {"counts": {"rows_read": 4}, "example": {"prompt": "é \ud800"}, "notes": ["one", None, 0.1]}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-launcher" / "data"


def blocks_of(documents: Documents, indices: list[int]) -> Blocks:
    """A row for each of these documents."""
    rows = len(indices)
    return Blocks(documents, np.arange(rows + 1), np.array(indices), np.full(rows, 16, np.int32), 3, 2, 16)


def make_entry(*, size: int = 4, validation: bool = True) -> Entry:
    numbers = np.arange(size, dtype=np.int32)
    documents = Documents.of([Document(numbers + n, (numbers % 2).astype(np.bool_)) for n in range(3)])
    return Entry(blocks_of(documents, [0, 2]), blocks_of(documents, [1]) if validation else None, META)


def assert_same(found: Any, expected: Any) -> None:
    """Equal in every field, dtypes included."""
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and np.array_equal(one, other), field.name
        elif dataclasses.is_dataclass(other):
            assert_same(one, other)
        else:
            assert one == other, field.name


@pytest.mark.parametrize("validation", [True, False])
def test_what_is_loaded_is_what_was_saved_read_only_and_private(folder, validation):
    entry = make_entry(validation=validation)
    assert load(NAME) is None
    assert save(entry, NAME) is None
    found = load(NAME)
    assert found is not None
    assert_same(found, entry)
    ids = found.train.documents.input_ids
    assert type(ids) is np.ndarray and not ids.flags.writeable and isinstance(ids.base, np.memmap)
    assert found.validation is None or found.validation.documents is found.train.documents
    assert np.array_equal(found.train.arrays([0, 1]).labels, entry.train.arrays([0, 1]).labels)
    assert (folder.stat().st_mode & 0o777, (folder / NAME).stat().st_mode & 0o777) == (0o700, 0o700)
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_arrays_without_an_element_and_numbers_of_numpy_survive():
    nothing = Documents.of([])
    blocks = Blocks(nothing, np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.int64(3), 2, 16)
    assert save(Entry(blocks, None, {"rows": np.int64(7)}), NAME) is None
    found = load(NAME)
    assert found is not None and found.meta == {"rows": 7} and len(found.train.documents) == 0


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "bit flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"7"),
    "missing": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_counts_as_absent_is_removed_and_made_anew(folder, damage):
    save(make_entry(), NAME)
    names = sorted(file.name for file in (folder / NAME).iterdir())
    assert len(names) == 11
    for name in names:
        assert load(NAME) is not None
        DAMAGE[damage](folder / NAME / name)
        assert load(NAME) is None, name
        assert list(folder.iterdir()) == [], name
        assert save(make_entry(), NAME) is None


@pytest.mark.parametrize("what", ["another's", "a file", "an empty folder", "a link"])
def test_an_entry_that_is_not_ours_is_removed_and_nothing_beyond_it(folder, tmp_path, what):
    save(make_entry(), OTHER)
    path = folder / NAME
    if what == "another's":
        shutil.copytree(folder / OTHER, path)
    elif what == "a file":
        path.write_text("{}")
    elif what == "an empty folder":
        path.mkdir()
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").touch()
        path.symlink_to(tmp_path / "elsewhere")
    assert load(NAME) is None and not os.path.lexists(path)
    assert what != "a link" or (tmp_path / "elsewhere" / "file").exists()
    assert load(OTHER) is not None


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_in_an_entry_is_not_run(folder, tmp_path):
    save(make_entry(), NAME)
    name = "documents.input_ids.npy"
    target, sums = folder / NAME / name, folder / NAME / "checksums"
    before = hashlib.blake2b(target.read_bytes()).hexdigest()
    np.save(target, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    sums.write_text(sums.read_text().replace(before, hashlib.blake2b(target.read_bytes()).hexdigest()))
    assert load(NAME) is None and not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_writers_of_the_same_entry_at_once_leave_one_whole_entry(folder):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: save(make_entry(size=5000), NAME), range(16))) == [None] * 16
    assert [path.name for path in folder.iterdir()] == [NAME]
    found = load(NAME)
    assert found is not None
    assert_same(found, make_entry(size=5000))


def test_the_least_recently_used_entries_go_first_and_never_the_one_just_written(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 2)
    for age, name in ((300, NAME), (200, OTHER)):
        save(make_entry(), name)
        os.utime(folder / name, (time.time() - age,) * 2)
    assert load(NAME) is not None  # used: now the younger
    save(make_entry(), "c" * 40)
    assert sorted(path.name[0] for path in folder.iterdir()) == ["a", "c"]
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    os.utime(folder / NAME, (time.time() + 60,) * 2)
    save(make_entry(), "d" * 40)
    assert [path.name[0] for path in folder.iterdir()] == ["d"]


def test_what_a_killed_writer_left_goes_after_a_day(folder):
    save(make_entry(), NAME)
    for name, age in ((".staging-old", 2 * 86_400), (".staging-young", 60)):
        (folder / name).mkdir()
        (folder / name / "meta.json").touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    save(make_entry(), OTHER)
    assert sorted(path.name for path in folder.iterdir()) == [".staging-young", NAME, OTHER]


def test_a_full_disk_is_a_note_and_leaves_nothing(folder, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    note = save(make_entry(), NAME)
    assert note is not None and str(folder) in note
    assert "cannot be written (No space left on device): the next run prepares the data again" in note
    assert list(folder.iterdir()) == [] and load(NAME) is None


def test_a_folder_that_cannot_be_had_is_a_note(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    note = save(make_entry(), NAME)
    assert note is not None and note.startswith("data cache /proc/nowhere/qlora-launcher/data cannot be written")
    assert load(NAME) is None


def test_a_hundred_thousand_rows_load_in_less_than_a_second():
    generator = np.random.default_rng(0)
    lengths = generator.integers(50, 250, 100_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(offsets[-1])
    documents = Documents(generator.integers(0, 128_000, tokens, np.int32), generator.random(tokens) < 0.5, offsets)
    save(Entry(blocks_of(documents, list(range(100_000))), None, {}), NAME)
    start = time.perf_counter()
    found = load(NAME)
    elapsed_s = time.perf_counter() - start
    assert found is not None and len(found.train.documents) == 100_000
    assert elapsed_s < 1


IDENTITIES = [["one", "two"], ["three"]]
CHANGES: dict[str, Any] = {
    "sources": [{"path": "rows.jsonl", "format": "text"}],
    "streaming": True,
    "template": "chatml",
    "batching": "padded",
    "max_length": 1024,
    "loss_on": "all",
    "bad_rows": "skip",
    "too_long": "drop",
    "validation": 0.1,
}


def name_of(tokenizer: Any, section: dict[str, Any] | None = None, **changes: Any) -> str:
    """The fingerprint with fields of the data section, or other arguments, changed."""
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}], "validation": 0.0, **(section or {})})
    return fingerprint(data, **{"identities": IDENTITIES, "tokenizer": tokenizer, "seed": 0, **changes})


def test_every_field_of_the_data_section_but_the_waiting_changes_the_fingerprint(tokenizer):
    assert {*CHANGES, "wait_s"} == set(DataSection.model_fields)
    names = [name_of(tokenizer), *(name_of(tokenizer, {field: value}) for field, value in CHANGES.items())]
    assert len(set(names)) == len(names)
    assert name_of(tokenizer, {"wait_s": 7}) == names[0]


def test_the_content_of_sources_and_not_their_place_decides(tokenizer):
    usual = name_of(tokenizer)
    assert name_of(tokenizer, {"sources": [{"path": "/else/where.jsonl"}]}) == usual
    others = [[["one"], ["two", "three"]], [["one", "two"], ["4"]], [["two", "one"], ["three"]]]
    names = [usual, *(name_of(tokenizer, identities=identities) for identities in others)]
    names += [name_of(tokenizer, {"sources": [{"path": "rows.jsonl", "weight": 2}]})]
    names += [name_of(tokenizer, {"sources": [{"path": "rows.txt"}]})]  # the same bytes, read otherwise
    names += [name_of(tokenizer, {"validation": "rows.jsonl"}), name_of(tokenizer, {"validation": "rows.csv"})]
    assert len(set(names)) == len(names)
    assert name_of(tokenizer, {"validation": "/else/where.csv"}) == names[-1]


def test_the_tokenizer_the_template_and_the_seed_decide(tokenizer, make_tokenizer):
    changed = make_tokenizer("llama3")
    changed.add_tokens(["<new>"])
    pad = make_tokenizer("llama3")
    pad.pad_token = "<|eot|>"
    names = [name_of(t) for t in (tokenizer, make_tokenizer("chatml"), changed, pad)]
    names += [name_of(tokenizer, seed=1)]
    assert len(set(names)) == len(names)
    assert name_of(make_tokenizer("llama3")) == names[0]


def test_a_change_of_our_code_or_of_a_package_makes_older_entries_unfindable(tokenizer, monkeypatch, tmp_path):
    usual = name_of(tokenizer)
    package = tmp_path / "data"
    shutil.copytree(Path(cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    assert name_of(tokenizer) == usual
    for file in (package / "packing.py", package / "new" / "template.jinja"):
        file.parent.mkdir(exist_ok=True)
        with open(file, "a") as opened:
            opened.write("\n")
    assert name_of(tokenizer) != usual
    monkeypatch.undo()
    assert name_of(tokenizer) == usual
    monkeypatch.setattr(cache, "version", lambda package: "0")
    assert name_of(tokenizer) != usual


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
    found = {subprocess.run(command, env=e, capture_output=True, text=True, check=True).stdout for e in environments}
    assert len(found) == 1 and len(found.pop().strip()) == 40
