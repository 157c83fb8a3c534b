import datetime
import json
import logging
import shutil
import threading
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from launcher.data.read import hub
from launcher.data.read.rows import Feed
from tests.support.reading import feeds, fields, refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]
ROWS = [{"text": "one"}, {"text": "two"}]
NAME = "owner/rows"


def open_hub(**keys: Any) -> Feed:
    [feed] = feeds(NAME, **keys)
    return feed


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Sets what the hub answers when it is asked for a dataset: a commit or an exception. Returns what it was asked."""
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def set_answer(value: str | Exception, once: threading.Event | None = None) -> list[tuple[str, str | None]]:
        def dataset_info(self: Any, name: str, revision: str | None = None, **_: Any) -> Any:
            asked.append((name, revision))
            if once is not None:
                once.wait()
            if isinstance(value, Exception):
                raise value
            return SimpleNamespace(sha=value)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        return asked

    return set_answer


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What an earlier run with owner/rows leaves in the cache of `datasets`, at COMMIT."""
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


@pytest.fixture
def loads(monkeypatch):
    """What `datasets` is asked to load; whatever the revision, it loads what is cached."""
    load, asked = datasets.load_dataset_builder, []

    def load_builder(path: str, name: str | None = None, revision: str | None = None) -> Any:
        asked.append((path, name, revision))
        return load(path, name)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    return asked


@pytest.mark.parametrize("path", [NAME, "rows"])
def test_an_unreachable_hub_is_reported_with_the_offline_way(path):
    message = refusal(path)  # the suite runs offline
    assert repr(path) in message and "data.sources=[{path: ./folder}]" in message and "Online: " in message


def test_a_hub_that_does_not_answer_is_not_waited_for(answer, monkeypatch):
    assert hub.HUB_TIMEOUT_S <= 5
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.2)
    answering = threading.Event()
    answer(COMMIT, once=answering)
    assert "no answer within" in refusal("owner/none") and not answering.is_set()
    answering.set()


def test_a_dataset_that_the_hub_refuses_is_not_taken_from_the_cache(answer, cached):
    refused = Exception("404 Client Error.\nRepository Not Found")
    refused.response = SimpleNamespace(status_code=404)  # type: ignore[attr-defined]
    answer(refused)
    assert "404 Client Error." in refusal(NAME)
    refused.response.status_code = 503  # type: ignore[attr-defined]
    assert fields(open_hub()) == ROWS


def test_the_commit_is_in_the_name_and_with_the_split_the_identity(answer):
    asked = answer(COMMIT)
    feed = open_hub(revision="main", split="test")
    assert set(asked) == {(NAME, "main")}
    assert COMMIT[:12] in feed.name and COMMIT in feed.identity
    identities = {feed.identity, open_hub(split="test").identity, open_hub().identity, open_hub(config="a").identity}
    answer(OTHER)
    assert len(identities) == 3 and open_hub(split="test").identity not in identities


def test_rows_are_of_the_commit_that_was_resolved(answer, cached, loads):
    answer(COMMIT)
    feed = open_hub(config="default")
    assert not loads and fields(feed) == ROWS
    assert loads == [(NAME, "default", COMMIT)]
    answer(OTHER)
    assert f"the cache holds commit {COMMIT}" in refusal(NAME)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_the_cache_serves_and_the_name_says_so(cached, streaming, monkeypatch):
    feed = open_hub(streaming=streaming)
    assert "from the cache: the hub cannot be reached" in feed.name and feed.identity.endswith(COMMIT)
    assert fields(feed) == fields(feed) == ROWS
    assert next(iter(feed.raw_rows())).where == f"{NAME} row 1"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert fields(feed) == ROWS
    assert not datasets.config.HF_HUB_OFFLINE, "offline for the cache's builder alone"


def test_without_the_hub_a_revision_must_be_the_cached_commit(cached):
    assert fields(open_hub(revision=COMMIT[:8])) == ROWS
    for revision in ("main", "ffff", "../../x"):
        message = refusal(NAME, revision=revision)
        assert f"the cache holds commit {COMMIT}, and '{revision}' was never asked for" in message


@pytest.mark.parametrize("revision", ["main", "refs/pr/1"])
def test_without_the_hub_a_branch_is_the_commit_that_it_last_was(answer, cached, loads, revision):
    for commit in (COMMIT, OTHER):
        answer(commit)
        open_hub(revision=revision)
        answer(ConnectionError("no route"))
        if commit == COMMIT:
            assert fields(open_hub(revision=revision)) == ROWS
        else:
            assert f"'{revision}' was {OTHER}" in refusal(NAME, revision=revision)


def test_datasets_is_quiet_and_its_loads_are_not_counted(cached, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()
    assert fields(open_hub()) == ROWS
    assert datasets.logging.get_verbosity() == logging.CRITICAL  # its handler writes to a stream of its own
    assert datasets.are_progress_bars_disabled() and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_a_typed_cell_is_a_fault_that_names_its_type_and_an_empty_split_has_no_rows(cached, monkeypatch):
    def as_dataset(split: str) -> Any:
        if split != "train":
            raise ValueError(f'Instruction "{split}" corresponds to no data!')  # as `datasets` does
        return datasets.Dataset.from_list([{"text": datetime.date(2020, 1, 1)}])

    info = SimpleNamespace(splits={"test": SimpleNamespace(num_examples=0)})
    builder = SimpleNamespace(info=info, download_and_prepare=lambda: None, as_dataset=as_dataset, hash=COMMIT)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    message = refusal(NAME)
    assert message.startswith(f"{NAME} row 1: ") and "a value of type date" in message
    assert fields(open_hub(split="test")) == []


def test_an_unknown_split_or_config_names_those_there_are(cached):
    message = refusal(NAME, split="test")
    assert "Should be one of" in message and "train" in message
    assert f"'{NAME}'" in refusal(NAME, config="other")
