"""Datasets of the hub: the commit is asked for in one short request, the rows come through the cache of `datasets`."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any

from launcher.data.read.tables import BATCH, unreadable
from launcher.data.read.text_files import Record
from launcher.errors import DataError
from launcher.recipe.data_section import Source

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT_S = 5.0  # for the one small request that resolves the commit
REFUSED = (401, 403, 404)  # statuses by which the hub says that this dataset is not to be had; others may pass


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub at one commit."""

    source: Source
    commit: str
    cached: bool  # the hub cannot be reached, and an earlier run has left the rows in the cache

    @property
    def name(self) -> str:
        note = ", from the cache: the hub cannot be reached" if self.cached else ""
        return f"{self.source.path} (commit {self.commit[:12]}{note})"

    @property
    def split(self) -> str:
        return self.source.split or "train"

    @property
    def identity(self) -> str:
        return f"hub:{self.source.path}:{self.source.config or ''}:{self.split}:{self.commit}"

    def records(self, *, streaming: bool) -> Iterator[Record]:
        return _records(self._build, self.source.path, split=self.split, streaming=streaming)

    def _build(self, datasets: ModuleType) -> Any:
        if self.cached:
            return _cached_builder(datasets, self.source)
        builder = datasets.load_dataset_builder(self.source.path, self.source.config, revision=self.commit)
        if builder.hash != self.commit:  # the connection was lost, and it took what it had
            raise ConnectionError(f"the hub cannot be reached any more, and the cache holds commit {builder.hash}")
        if self.source.revision:
            _remember(self.source)
        return builder


def find(source: Source) -> HubDataset:
    """The dataset at its commit of now: the hub's, or the cache's when the hub does not answer.

    Raises DataError within seconds when neither has it.
    """
    answer = _commit(source)
    if isinstance(answer, str):
        return HubDataset(source, answer, cached=False)
    if getattr(getattr(answer, "response", None), "status_code", 0) in REFUSED:
        raise _not_found(source, answer)
    try:
        commit = _cached_builder(quiet_datasets(), source).hash
    except Exception as error:  # its kinds differ between causes and versions; all mean "not there"
        raise _not_found(source, answer) from error
    if source.revision and not commit.startswith(source.revision):
        wanted = _remembered(source)
        if commit != wanted:
            known = f"{source.revision!r} was {wanted[:12]}" if wanted else f"not which commit {source.revision!r} is"
            raise _not_found(source, ConnectionError(f"no answer; the cache holds commit {commit}, and {known}"))
    return HubDataset(source, commit, cached=True)


def _remember(source: Source) -> None:
    """Has the hub's client note which commit a branch or tag is: the rows are asked for by the commit alone."""
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # no card, or no connection any more: a later run without the hub says what is missing
        hf_hub_download(source.path, "README.md", repo_type="dataset", revision=source.revision)


def _remembered(source: Source) -> str | None:
    """The commit that a branch or tag was when the hub's client last asked; None when it never has.

    Its cache is laid out as in https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, "--".join(["datasets", *source.path.split("/")]), "refs")
    try:
        return (folder / str(source.revision)).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _commit(source: Source) -> str | Exception:
    """The hub's answer, or why there is none."""
    from huggingface_hub import HfApi

    answers: SimpleQueue[str | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            info = HfApi().dataset_info(source.path, revision=source.revision, timeout=HUB_TIMEOUT_S)
            answers.put(str(info.sha))
        except Exception as error:  # the client has a dozen kinds, from DNS to licence gates
            answers.put(error)

    # In a thread, because the client's timeout counts anew for each address of the hub, and not at all for its name.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=HUB_TIMEOUT_S)
    except Empty:
        return TimeoutError(f"no answer within {HUB_TIMEOUT_S:.0f} s")


def _cached_builder(datasets: ModuleType, source: Source) -> Any:
    """The builder of what the cache of `datasets` holds, whatever its commit: it does not look at the revision."""
    online = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset_builder(source.path, source.config)
    finally:
        datasets.config.HF_HUB_OFFLINE = online


def _not_found(source: Source, error: Exception) -> DataError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return DataError(
        f"dataset {source.path!r} is no file or folder here, not in the local cache, and not to be had from the hub.\n"
        f"Found: {reason[:160]}\n"
        "Online: check the name, the revision and your login.\n"
        "Offline: copy its files here and set data.sources=[{path: ./folder}]."
    )


Build = Callable[[ModuleType], Any]  # `datasets` -> a DatasetBuilder


def _records(build: Build, name: str, *, split: str, streaming: bool) -> Iterator[Record]:
    """The rows of a split as `datasets` gives them. Raises DataError with its reason when it cannot."""
    number = 0
    for batch in _batches(build, name, split=split, streaming=streaming):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Record(f"{name} row {number}", dict(zip(columns, values, strict=True)))


def _batches(build: Build, name: str, *, split: str, streaming: bool) -> Iterator[dict[str, list[Any]]]:
    number = 0
    try:
        builder = build(quiet_datasets())
        if streaming:
            dataset = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            if split in builder.info.splits and not builder.info.splits[split].num_examples:
                return  # it refuses to give a dataset without rows
            dataset = builder.as_dataset(split)
        for batch in dataset.iter(batch_size=BATCH):
            yield batch
            number += len(next(iter(batch.values())))
    except Exception as error:  # its own kinds, and those of Arrow, of the hub and of the network behind it
        remedy = "Correct the source or its config, split and revision"
        raise unreadable(name, error, after=number, remedy=remedy) from error


def quiet_datasets() -> ModuleType:
    """`datasets`, imported when the hub is asked for rows and not before: it takes over a second.

    Without bars and log lines (`unreadable` says what it would log), and without the request by which it counts every
    load: https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/load.py#L189.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets
