"""Datasets of the Hugging Face hub: one short request resolves the commit, the rows come through `datasets`' cache."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from launcher.credentials import shortened
from launcher.data.read.rows import Feed, RawRow
from launcher.data.read.tables import BATCH_ROWS, unreadable
from launcher.errors import DataError
from launcher.recipe.data_section import Source
from launcher.recipe.hub_request import HUB_TIMEOUT_S, answered

REFUSED = (401, 403, 404)  # statuses that mean: you cannot have this dataset. After others, the cache serves


def open_dataset(source: Source, *, streaming: bool) -> Feed:
    """The dataset at its current commit, or as it is cached if the hub does not answer.

    Raises DataError within seconds if it is in neither place.
    """
    answer, split = _current_commit(source), source.split or "train"
    online = isinstance(answer, str)
    commit = answer if isinstance(answer, str) else _cached_commit(source, answer)
    note = "" if online else ", from the cache: the hub cannot be reached"
    return Feed(
        source=source.path,
        name=f"{source.path} (commit {commit[:12]}{note})",
        format=source.format,
        identity=f"hub:{source.path}:{source.config or ''}:{split}:{commit}",
        raw_rows=partial(_raw_rows, source, commit if online else None, split=split, streaming=streaming),
    )


def _current_commit(source: Source) -> str | Exception:
    """The hub's answer, or why there is none."""
    from huggingface_hub import HfApi

    api, revision = HfApi(), source.revision
    try:
        commit = answered(
            lambda: str(api.dataset_info(source.path, revision=revision, timeout=HUB_TIMEOUT_S).sha),
            timeout_s=HUB_TIMEOUT_S,
        )
    except Exception as error:  # the client has a dozen kinds, from DNS to licence gates
        return error
    if revision:  # the client notes the commit of a branch, for _cached_commit in a later run
        with suppress(Exception):
            answered(lambda: api.resolve_revision(source.path, repo_type="dataset", revision=revision))
    return commit


def _cached_commit(source: Source, error: Exception) -> str:
    """The cached commit, if it is the one that the source asks for. `error`: why the hub gives none."""
    from huggingface_hub import HfApi

    if getattr(getattr(error, "response", None), "status_code", 0) in REFUSED:
        raise _not_found(source, error)
    try:
        commit = str(_builder(source, None).hash)
    except Exception as missing:  # its kind depends on the cause and the version
        raise _not_found(source, error) from missing
    revision, known = source.revision, "never asked for"
    if not revision or commit.startswith(revision):
        return commit
    with suppress(Exception):
        noted = HfApi().resolve_revision(source.path, repo_type="dataset", revision=revision, local_files_only=True)
        known = noted.resolved
    if commit != known:
        reason = f"no answer; the cache holds commit {commit}, and {revision!r} was {known}"
        raise _not_found(source, ConnectionError(reason))
    return commit


def _builder(source: Source, commit: str | None) -> Any:
    """The builder of `datasets` for that commit; None: for whichever is cached."""
    import datasets  # here, as it takes over a second
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # `unreadable` reports what it would log
    # Else a request counts each load: https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/load.py#L189
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or commit is None  # offline, it ignores the revision
    try:
        builder = datasets.load_dataset_builder(source.path, source.config, revision=commit)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if commit and builder.hash != commit:  # the connection was lost, and it took what is cached
        raise ConnectionError(f"the hub cannot be reached any more, and the cache holds commit {builder.hash}")
    return builder


def _not_found(source: Source, error: Exception) -> DataError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return DataError(
        f"dataset {source.path!r} is no file or folder here, not in the local cache, and not to be had from the hub.\n"
        f"Found: {shortened(reason, 160)}\n"
        "Online: check the name, the revision and your login.\n"
        "Offline: copy its files here and set data.sources=[{path: ./folder}]."
    )


def _raw_rows(source: Source, commit: str | None, *, split: str, streaming: bool) -> Iterator[RawRow]:
    """The rows of a split. Raises DataError with the reason when `datasets` cannot give them."""
    number = 0
    try:
        for batch in _batches(_builder(source, commit), split=split, streaming=streaming):
            for values in zip(*batch.values(), strict=True):
                number += 1
                fields = dict(zip(batch, values, strict=True))
                yield RawRow(f"{source.path} row {number}", fields, null_filled=True)
    except Exception as error:  # kinds of `datasets`, Arrow, the hub and the network
        remedy = "Correct the source or its config, split and revision"
        raise unreadable(source.path, error, after=number, remedy=remedy) from error


def _batches(builder: Any, *, split: str, streaming: bool) -> Iterator[dict[str, list[Any]]]:
    if streaming:
        yield from builder.as_streaming_dataset(split).iter(batch_size=BATCH_ROWS)
        return
    builder.download_and_prepare()
    splits = builder.info.splits
    if split not in splits or splits[split].num_examples:  # `datasets` refuses to open a split without rows
        yield from builder.as_dataset(split).iter(batch_size=BATCH_ROWS)
