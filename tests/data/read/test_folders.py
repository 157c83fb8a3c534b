"""Of a folder, files of one kind and one split are read; which ones, and why not the others, is said."""

import gzip
import json

import pytest

from launcher.checkpoint.folder import RunFolder
from tests.support.reading import fields, opened, read, refusal

LINE = json.dumps({"text": "a river"}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with files of these names."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = LINE.encode()
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path

    return make


def names_read(folder, **keys):
    return [feed.name.removeprefix(f"{folder}/") for feed in opened(folder, **keys).feeds]


HUB = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    ("files", "of_training"),
    [
        (["LICENSE.txt", "requirements.txt", "a.jsonl"], ["a.jsonl"]),
        (["notes.txt", "a.jsonl", "README.md"], ["a.jsonl"]),
        (["README.txt", "book.txt", "LICENCE"], ["book.txt"]),
        (["dataset_infos.json", "a.jsonl"], ["a.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["train.jsonl", "more.jsonl"], None),
        (["a.jsonl", "b.jsonl", "eval.jsonl", "dev.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["contest.jsonl", "pretrain.jsonl", "latest.jsonl", "devil.jsonl"], None),
        (["Test/a.jsonl", "Train/a.jsonl", "validation/a.jsonl"], ["Train/a.jsonl"]),
        (["training_set.jsonl", "testset.jsonl", "my-valid.1.jsonl"], ["training_set.jsonl"]),
        (["a.jsonl", "tests.jsonl", "evals.jsonl", "holdout.jsonl", "heldout.jsonl", "held_out.jsonl"], ["a.jsonl"]),
        (["a.jsonl", "chatsTest.jsonl", "GSM8KTest.jsonl", "chatsHeldOut.jsonl", "evalSet/b.jsonl"], ["a.jsonl"]),
        (["train_vs_test.jsonl", "a.jsonl", "conTrain/test.jsonl"], ["a.jsonl", "train_vs_test.jsonl"]),
        ([*HUB, "README.md"], HUB[:2]),
        (["train-1.jsonl.gz", "train-2.jsonl.gz", "test.jsonl.gz"], ["train-1.jsonl.gz", "train-2.jsonl.gz"]),
        (["a.jsonl", "a.jsonl.gz"], ["a.jsonl"]),
        (["a.jsonl", "b.jsonl.zst"], ["a.jsonl"]),
    ],
)
def test_the_training_files_of_one_kind_are_read_and_the_others_named(folder, files, of_training):
    path = folder(*files)
    of_training = sorted(of_training or files)
    assert names_read(path) == of_training
    [note] = opened(path).notes
    read_part, _, left_out = note.removeprefix(f"{path}: read ").partition("; left out ")
    assert read_part.split(", ") == of_training
    assert all(name in left_out for name in files if name not in of_training)


def test_files_of_the_only_split_are_read_and_the_note_says_which_it_is(folder):
    path = folder("test/a.jsonl", "test/b.jsonl", "README.md")
    [note] = opened(path).notes
    assert note.startswith(f"{path}: read test/a.jsonl, test/b.jsonl (by name the split test: there is no other); left")
    for keys in ({"split": "test"}, {"validates": True}):
        assert "by name" not in opened(path, **keys).notes[0]


def test_what_a_run_wrote_into_the_folder_of_the_data_is_left_out(folder):
    path = folder("a.jsonl", "metrics.jsonl", "run/b.jsonl")
    assert names_read(path) == ["a.jsonl", "metrics.jsonl", "run/b.jsonl"], "one such file alone may be data"
    (path / "metrics.jsonl").unlink()
    for output_dir in (path, path / "run"):
        run = RunFolder(output_dir)
        run.create()
        run.metrics.write_text('{"step": 1}')
        for file in (run.report, run.status, output_dir / "metrics.earlier.jsonl", run.adapter / "adapter_config.json"):
            file.parent.mkdir(exist_ok=True)
            file.write_text("{}")
    assert names_read(path) == ["a.jsonl", "run/b.jsonl"]
    assert "metrics.jsonl, " in opened(path).notes[0].partition("left out ")[2]


def test_reasons_are_given_and_long_lists_are_cut(folder):
    path = folder("a.jsonl", "LICENSE.txt", "notes.txt", "test.jsonl", "b.jsonl.gz", *(f"{n}.png" for n in range(9)))
    [note] = opened(path).notes
    for part in (
        "LICENSE.txt (about the data)",
        "notes.txt (text beside .jsonl)",
        "test.jsonl (split test)",
        "b.jsonl.gz (packed, beside files that are not)",
        "0.png, 1.png, 2.png, 3.png, 4.png, 4 more (no kind of file that is read)",
    ):
        assert part in note


@pytest.mark.parametrize(
    ("files", "of_validation"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["validation.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "eval.jsonl", "test.jsonl"], ["eval.jsonl"]),
        (["a.jsonl", "holdout.jsonl", "tests.jsonl"], ["holdout.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_of_a_folder_that_validates_the_validation_files_are_read(folder, files, of_validation):
    assert names_read(folder(*files), validates=True) == of_validation


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["train_gen.jsonl", "train_sft.jsonl"]),
        ("train_sft", ["train_sft.jsonl"]),
        ("test", ["test_sft.jsonl"]),
        ("validation", ["dev.jsonl"]),
        ("VAL", ["dev.jsonl"]),
    ],
)
def test_a_split_of_a_folder_can_be_named(folder, split, expected):
    path = folder("train_sft.jsonl", "train_gen.jsonl", "test_sft.jsonl", "dev.jsonl")
    assert names_read(path, split=split) == expected


@pytest.mark.parametrize(
    ("files", "keys", "found"),
    [
        (["train.jsonl"], {"split": "test"}, "split: 'test' and files of the splits train"),
        (["test.jsonl", "dev.jsonl"], {}, "files of the splits test, validation"),
        (["a.jsonl", "b.csv"], {}, "Found: .csv, .jsonl"),
        (["a.json", "b.jsonl"], {}, "Found: .json, .jsonl"),
        (["LICENSE.txt", "a.jsonl.xz"], {}, "Found: LICENSE.txt, a.jsonl.xz"),
    ],
)
def test_a_folder_that_leaves_the_choice_open_is_refused(folder, files, keys, found):
    assert found in refusal(folder(*files), **keys)


def test_kinds_of_other_splits_do_not_matter(folder):
    assert names_read(folder("train.jsonl", "test.csv", "test.json")) == ["train.jsonl"]


def test_all_files_of_a_folder_have_the_format_of_its_first_row(folder):
    path = folder("a.jsonl", "b.jsonl", "c.jsonl")
    (path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert refusal(path).startswith(
        f'{path}/b.jsonl:1: all rows of a source have its format, here with the column "text"'
    )
    rows, counts = read(path, bad_rows="skip")
    assert (len(rows), counts["rows_dropped_wrong_type"]) == (2, 1)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt"])
def test_a_packed_text_file_gives_the_rows_of_what_it_holds(tmp_path, suffix):
    content = {"json": "[" + LINE + "]", "csv": "text\na river\n", "txt": "a river\n"}.get(suffix, LINE).encode()
    plain, packed = tmp_path / f"rows.{suffix}", tmp_path / f"rows.{suffix}.GZ"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert fields(packed) == fields(plain) == [{"text": "a river"}]
    assert opened(packed).feeds[0].identity == opened(plain).feeds[0].identity
    packed.write_bytes(gzip.compress(content * 1000)[:-12])
    assert "must be readable" in refusal(packed)
    packed.write_bytes(b"no gzip")
    assert "Not a gzipped file" in refusal(packed, streaming=True)
    packed.write_bytes(gzip.compress(content)[:10] + b"\xff" * 9)
    assert "must be readable" in refusal(packed, bad_rows="skip")
