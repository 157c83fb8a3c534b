import datetime
import json
import logging
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.data.read import hub
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import RowFault
from launcher.data.read.sources import Feed, open_source
from launcher.errors import DataError
from launcher.recipe.data_section import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"text": "one"}, {"text": "two"}]


class Refusal(Exception):
    response = SimpleNamespace(status_code=404)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the hub answers when it is asked for a dataset: a commit, or an exception."""
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def set_answer(value: str | Exception, after_s: float = 0) -> list[tuple[str, str | None]]:
        def dataset_info(self: Any, name: str, revision: str | None, timeout: float) -> Any:
            asked.append((name, revision))
            assert timeout <= 5
            time.sleep(after_s)
            if isinstance(value, Exception):
                raise value
            return SimpleNamespace(sha=value)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        return asked

    return set_answer


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an earlier run with owner/rows leaves in the cache of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    files = {"train": str(tmp_path / "rows.parquet")}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "prepared"))
    builder.download_and_prepare()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "cache" / "owner___rows" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, folder)
    (folder / "parquet-train.arrow").rename(folder / "rows-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default", "dataset_name": "rows"}))
    return folder


def open_hub(path: str = "owner/rows", *, streaming: bool = False, **keys: str) -> Feed:
    [feed] = open_source(Source.model_validate({"path": path, **keys}), streaming=streaming)
    return feed


def refusal(path: str = "owner/rows", **keys: str) -> str:
    with pytest.raises(DataError) as caught:
        open_hub(path, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5 and path in message
    return message


def texts(feed: Feed) -> list[str]:
    rows = [record.fields for record in feed.records()]
    return [row["text"] for row in rows if not isinstance(row, RowFault)]


@pytest.mark.parametrize("path", ["owner/rows", "rows"])
def test_an_unreachable_hub_is_said_within_seconds_with_the_offline_way(path: str) -> None:
    start = time.monotonic()
    message = refusal(path)  # the suite runs offline
    assert time.monotonic() - start < 10
    assert "data.sources=[{path: ./folder}]" in message and "Online: " in message


def test_a_hub_that_does_not_answer_is_not_waited_for(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.2)
    answer(COMMIT, after_s=5)
    start = time.monotonic()
    assert "no answer within" in refusal("owner/none")
    assert time.monotonic() - start < 4


def test_a_dataset_that_the_hub_refuses_is_not_taken_from_the_cache(answer: Any, cached: Path) -> None:
    answer(Refusal("404 Client Error.\nRepository Not Found"))
    assert "404 Client Error." in refusal()


def test_the_commit_is_resolved_once_and_is_the_identity(answer: Any) -> None:
    asked = answer(COMMIT)
    feed = open_hub(revision="main", split="test")
    assert asked == [("owner/rows", "main")]
    assert COMMIT[:12] in feed.name and COMMIT in feed.identity and "test" in feed.identity
    answer(COMMIT[::-1])
    assert open_hub(revision="main", split="test").identity != feed.identity
    answer(COMMIT)
    assert open_hub(revision="main").identity != feed.identity


def test_rows_are_of_the_commit_that_was_resolved(answer: Any, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    load, asked = datasets.load_dataset_builder, []

    def load_builder(path: str, name: str | None = None, revision: str | None = None) -> Any:
        asked.append((path, name, revision))
        return load(path, name)  # offline: that of the cache

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    answer(COMMIT)
    assert texts(open_hub(config="default")) == ["one", "two"]
    assert asked == [("owner/rows", "default", COMMIT)]
    answer(COMMIT[::-1])
    feed = open_hub()
    with pytest.raises(DataError, match=f"the cache holds commit {COMMIT}"):
        texts(feed)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_the_cache_serves_and_it_is_said(cached: Path, streaming: bool) -> None:
    import datasets

    feed = open_hub(streaming=streaming)
    assert "from the cache: the hub cannot be reached" in feed.name and feed.identity.endswith(COMMIT)
    assert texts(feed) == texts(feed) == ["one", "two"]
    assert next(iter(feed.records())).where == "owner/rows row 1"
    datasets.config.HF_HUB_OFFLINE = False
    try:
        texts(feed)
        assert not datasets.config.HF_HUB_OFFLINE, "offline for the cache's builder alone"
    finally:
        datasets.config.HF_HUB_OFFLINE = True


def test_without_the_hub_a_revision_must_be_the_cached_commit(cached: Path) -> None:
    assert texts(open_hub(revision=COMMIT[:8])) == ["one", "two"]
    for revision in ("main", "ffff", "../../x"):
        message = refusal(revision=revision)
        assert f"the cache holds commit {COMMIT}, and not which commit '{revision}' is" in message


def test_without_the_hub_a_branch_is_the_commit_that_it_last_was(
    answer: Any, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []
    refs = tmp_path / "hub" / "datasets--owner--rows" / "refs"

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str) -> str:
        """As the hub's client does it: the card, and beside it the commit of the branch."""
        asked.append((repo_id, filename, repo_type))
        (refs / revision).parent.mkdir(parents=True, exist_ok=True)
        (refs / revision).write_text(COMMIT)
        return "README.md"

    load = datasets.load_dataset_builder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name=None, **_: load(path, name))
    answer(COMMIT)
    assert texts(open_hub()) == ["one", "two"] and not asked
    for revision in ("main", "refs/pr/1"):
        answer(COMMIT)
        assert texts(open_hub(revision=revision)) == ["one", "two"]
        answer(ConnectionError("no route"))
        assert texts(open_hub(revision=revision)) == ["one", "two"]
        (refs / revision).write_text(COMMIT[::-1])
        assert f"'{revision}' was {COMMIT[::-1][:12]}" in refusal(revision=revision)
    assert asked == [("owner/rows", "README.md", "dataset")] * 2


def test_the_clients_own_cache_is_where_a_branch_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import file_download

    folder = tmp_path / file_download.repo_folder_name(repo_id="owner/rows", repo_type="dataset")
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    file_download._cache_commit_hash_for_specific_revision(str(folder), "main", COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub._remembered(Source(path="owner/rows", revision="main")) == COMMIT
    assert hub._remembered(Source(path="owner/rows", revision="dev")) is None


def test_datasets_is_quiet_and_its_loads_are_not_counted(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()
    assert texts(open_hub()) == ["one", "two"]
    assert datasets.logging.get_verbosity() == logging.CRITICAL  # its handler writes to a stream of its own
    assert datasets.are_progress_bars_disabled() and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_a_typed_cell_of_the_hub_is_a_fault_that_names_its_type(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    day = datasets.Dataset.from_list([{"text": datetime.date(2020, 1, 1)}])
    builder = SimpleNamespace(
        info=SimpleNamespace(splits={}), download_and_prepare=lambda: None, as_dataset=lambda split: day, hash=COMMIT
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(RowFault, match="owner/rows row 1: (.|\n)*a value of type date"):
        list(read_rows(open_hub(), bad_rows="raise", counts=Counter()))


def test_an_unknown_split_or_config_names_those_there_are(cached: Path) -> None:
    with pytest.raises(DataError, match="Should be one of") as caught:
        texts(open_hub(split="test"))
    assert "train" in str(caught.value) and len(str(caught.value).splitlines()) <= 5
    assert "'owner/rows'" in refusal(config="other")
