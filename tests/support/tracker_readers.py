"""What each tool that run.trackers can name holds of a run, read from its own files in its own format."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Seen:
    """A run as its tool has it. `tables` are texts; `summary` has the names without a prefix."""

    config: dict[str, Any] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)
    figures: set[str] = field(default_factory=set)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)
    runs: int = 0


def read_tensorboard(folder: Path) -> Seen:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = folder / "trackers" / "tensorboard"
    events = EventAccumulator(str(place), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    sessions, hparams = _hparams_tab(folder)
    seen = Seen(runs=len(sessions))
    for session, values in zip(sessions, hparams, strict=True):
        seen.config |= {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
        metrics = {metric.name.tag for metric in session.metric_values}
        assert metrics == {"loss", "eval_loss"}, "they stand beside the hyperparameters"
    for tag in events.Tags()["scalars"]:
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        seen.figures.add(tag)
        seen.summary[tag.removeprefix("summary/")] = values[-1][1]
        seen.losses = values if tag == "loss" else seen.losses
        seen.evals = values if tag == "eval_loss" else seen.evals
    for tag in events.Tags()["tensors"]:
        texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        name = tag.removesuffix("/text_summary")
        seen.tables[name] = "\n".join(texts)
        seen.summary[name.removeprefix("summary/")] = texts[-1]
        seen.statuses = texts if name == "status" else seen.statuses
    return seen


def _hparams_tab(folder: Path) -> tuple[list[Any], list[Any]]:
    """The sessions of the HParams tab of `tensorboard --logdir FOLDER`, and the hyperparameters of each."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    request = ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=Status.values())
    context = Context(TBContext(data_provider=provider))
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    return [session for group in groups for session in group.sessions], [group.hparams for group in groups]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes, a record in 1 or more parts."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32_768 - place % 32_768  # of a block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_wandb(folder: Path) -> Seen:
    seen, ids = Seen(), set()
    for path in sorted(folder.glob("trackers/wandb/offline-run-*/run-*.wandb")):
        for record in wandb_records(path):
            ids |= {record.run.run_id} - {""}
            seen.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            seen.figures |= set(row)
            seen.losses += [(row["_step"], row["loss"])] if "loss" in row else []
            seen.evals += [(row["_step"], row["eval_loss"])] if "eval_loss" in row else []
            for item in record.summary.update:
                seen.summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("exit"):
                seen.statuses.append(f"{seen.summary['status']} ({record.exit.exit_code})")
        for table in path.parent.rglob("*.table.json"):
            name = table.name.split("_", 2 if table.name.startswith("eval_") else 1)
            seen.tables["_".join(name[:-1])] = table.read_text()
    seen.runs = len(ids)
    return seen


def read_mlflow(folder: Path) -> Seen:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/trackers/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'qlora-launcher'")
    runs = client.search_runs([experiment.experiment_id])
    run, seen = runs[0], Seen(runs=len(runs))
    seen.config, seen.figures = dict(run.data.params), set(run.data.metrics)
    history = {name: client.get_metric_history(run.info.run_id, name) for name in ("loss", "eval_loss")}
    seen.losses, seen.evals = (sorted((m.step, m.value) for m in history[name]) for name in ("loss", "eval_loss"))
    seen.summary = {**run.data.metrics, **run.data.tags}
    for file in (folder / "trackers" / "mlflow" / "artifacts").rglob("*.json"):
        seen.tables[file.stem] = file.read_text()
    seen.statuses = [f"{run.data.tags['status']} ({run.info.status})"]
    return seen


def read_trackio(folder: Path) -> Seen:
    from trackio.sqlite_storage import SQLiteStorage

    runs = [name for name in SQLiteStorage.get_runs("qlora-launcher") if name.startswith(f"{folder.name}-")]
    seen = Seen(SQLiteStorage.get_run_config("qlora-launcher", runs[0]) or {}, runs=len(runs))
    for row in SQLiteStorage.get_logs("qlora-launcher", runs[0]):
        seen.figures |= set(row)
        seen.losses += [(row["step"], row["loss"])] if "loss" in row else []
        seen.evals += [(row["step"], row["eval_loss"])] if "eval_loss" in row else []
        seen.summary |= {name.removeprefix("summary/"): value for name, value in row.items()}
        seen.tables |= {name: json.dumps(value) for name, value in row.items() if isinstance(value, dict)}
        seen.statuses += [row["status"]] if "status" in row else []
    return seen


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
