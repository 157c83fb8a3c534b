"""The tools that run.trackers names, each behind the same few methods. A tool's package is imported by `start`.

Accelerate's tracker classes start a tool, hand it the configuration and the figures. They are used without an
Accelerator: `main_process_only=False` keeps them from asking for the rank, which api.py has done, and the process state
that their logger needs is there, since the run has made it. What they do not offer is asked of the tool itself:
- a final status, summary values and tables, in every tool,
- TensorBoard: the configuration beside the figures, once,
- MLflow: one request for all figures that wait (Accelerate makes one a step), and a run that goes on with another
  value of a parameter, which MLflow refuses,
- Trackio: the configuration is given to `init`; Accelerate's way adds a key `allow_val_change` to it.

A tool's own settings and environment variables say where it writes and who is logged in. Nothing is sent beside what
this module hands over: no code, no git state, no console, no figures of the machine, no telemetry.
"""

import importlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.runtime.environment import set_for_run

Scalars = Mapping[str, float | int | str | bool]
Rows = Sequence[tuple[int, Mapping[str, float]]]  # (step, figures by name), the steps ascending
TRACKER_PROJECT = "qlora-launcher"  # of runs, where the tool's own variable names none


class TrackingTool:
    """One tool and its run. All methods are called from one thread, `start` first and `finish` last.

    `folder`: the run folder. `identity`: what the tool knows the run by, kept over resumes; `start` settles it.
    """

    rewinds = False  # whether the tool itself drops the steps that a resumed run does again

    def __init__(self, folder: Path, identity: str | None) -> None:
        self.folder, self.resumed = folder, identity is not None
        self.identity = identity or f"{folder.name}-{secrets.token_hex(3)}"
        self.place = folder / "trackers"
        self.tracker: Any = None

    def _open(self, kind: str, *names: str, **settings: Any) -> None:
        from accelerate import PartialState

        PartialState()
        self.tracker = getattr(importlib.import_module("accelerate.tracking"), kind)(*names, **settings)
        self.tracker.main_process_only = False
        self.tracker.start()

    def start(self, config: Scalars, *, step: int) -> None:
        """Begin the run, or go on with it after `step`."""
        raise NotImplementedError

    def log(self, rows: Rows) -> None:
        for step, figures in rows:
            self.tracker.log(dict(figures), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Rows with the same columns."""
        raise NotImplementedError

    def summary(self, values: Scalars, *, step: int) -> None:
        """What is known at the end of training."""
        raise NotImplementedError

    def finish(self, status: str, code: int, *, step: int) -> None:
        """`status`: "finished", or "failed: the reason"."""
        raise NotImplementedError


class TensorBoardTool(TrackingTool):
    """Event files in trackers/tensorboard; the configuration is in the HParams tab, texts and tables in Text."""

    rewinds = True

    def start(self, config: Scalars, *, step: int) -> None:
        self._write_hparams(self.place / "tensorboard", config)
        self._open("TensorBoardTracker", "tensorboard", str(self.place), purge_step=step + 1)

    @staticmethod
    def _write_hparams(folder: Path, config: Scalars) -> None:
        """Accelerate's way makes a folder of its own, which TensorBoard takes for another run. Here it is a file beside
        that of the figures, written before it, so that live views do not pass over the figures; a run that goes on
        replaces it, since of two TensorBoard shows the first."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for earlier in folder.glob("*.hparams"):
            earlier.unlink()
        with SummaryWriter(str(folder), filename_suffix=".hparams") as writer:
            for summary in hparams(dict(config), {"loss": None, "eval_loss": None}):
                writer.file_writer.add_summary(summary)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        head = " | ".join(rows[0])
        lines = [" | ".join(_in_a_cell(value) for value in row.values()) for row in rows]
        self.tracker.log({name: "\n".join([head, " | ".join("---" for _ in rows[0]), *lines])}, step=step)

    def summary(self, values: Scalars, *, step: int) -> None:
        self.tracker.log({f"summary/{name}": value for name, value in values.items()}, step=step)

    def finish(self, status: str, code: int, *, step: int) -> None:
        self.tracker.log({"status": status}, step=step)
        self.tracker.finish()


def _in_a_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


class WandbTool(TrackingTool):
    """Files in trackers/wandb, sent on unless WANDB_MODE=offline. A step that the run does again keeps its figures."""

    def start(self, config: Scalars, *, step: int) -> None:
        set_for_run("WANDB_ERROR_REPORTING", "false")
        import wandb

        session = wandb.setup().settings
        if not (session._offline or session._noop) and not wandb.login(prompt=False):  # init would ask on the terminal
            raise PermissionError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        self.place.mkdir(exist_ok=True)
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            silent=True,
            init_timeout=30,
            finish_timeout=8,
            finish_timeout_raises=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        project, run = session.project or TRACKER_PROJECT, {"id": self.identity, "name": self.folder.name}
        self._open("WandBTracker", project, **run, resume="allow", dir=str(self.place), settings=settings)
        self.tracker.store_init_configuration(dict(config))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        columns = [*rows[0]]
        self.tracker.log_table(name, columns=columns, data=[[*row.values()] for row in rows], step=step)

    def summary(self, values: Scalars, *, step: int) -> None:
        self.tracker.tracker.summary.update(dict(values))

    def finish(self, status: str, code: int, *, step: int) -> None:
        self.tracker.tracker.summary["status"] = status
        self.tracker.tracker.finish(exit_code=code)


class MlflowTool(TrackingTool):
    """The store that MLFLOW_TRACKING_URI names, else trackers/mlflow/mlflow.db. `identity` is MLflow's run id."""

    BATCH = 1_000  # figures that MLflow takes in one request

    def start(self, config: Scalars, *, step: int) -> None:
        set_for_run("MLFLOW_DISABLE_TELEMETRY", "true")
        set_for_run("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow

        has_store, store = mlflow.is_tracking_uri_set(), self.place / "mlflow"
        if not has_store:
            store.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
        try:
            self.client = mlflow.MlflowClient()
            run = {"run_id": self.identity} if self.resumed else {"run_name": self.folder.name}
            artifacts = None if has_store else (store / "artifacts").as_uri()
            self._open("MLflowTracker", TRACKER_PROJECT, logging_dir=artifacts, **run)
            self.identity, known = self.tracker.tracker.info.run_id, self.tracker.tracker.data.params
            self.tracker.store_init_configuration({name: value for name, value in config.items() if name not in known})
        finally:
            if not has_store:
                mlflow.set_tracking_uri(None)  # else the next run of this process would go there
        for name, value in config.items():
            if known.get(name, str(value)) != str(value):  # MLflow refuses another value of a parameter
                self.client.set_tag(self.identity, f"resumed.{name}", value)

    def log(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()]
        for begin in range(0, len(metrics), self.BATCH):
            self.client.log_batch(self.identity, metrics=metrics[begin : begin + self.BATCH])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self.client.log_table(self.identity, data=columns, artifact_file=f"{name}.json")

    def summary(self, values: Scalars, *, step: int) -> None:
        self.log([(step, {name: value for name, value in values.items() if not isinstance(value, str)})])
        for name, value in values.items():
            if isinstance(value, str):
                self.client.set_tag(self.identity, name, value)

    def finish(self, status: str, code: int, *, step: int) -> None:
        self.client.set_tag(self.identity, "status", status)
        self.client.set_terminated(self.identity, "FAILED" if code else "FINISHED")


class TrackioTool(TrackingTool):
    """Trackio's own folder (TRACKIO_DIR), Space or server. `identity` is the run's name there."""

    def start(self, config: Scalars, *, step: int) -> None:
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        project = os.environ.get("TRACKIO_PROJECT", TRACKER_PROJECT)
        self._open("TrackioTracker", project, name=self.identity, resume="allow", config=dict(config), **quiet)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        import trackio

        data: list[Any] = [dict(row) for row in rows]  # its own annotation leaves dicts out
        self.tracker.log({name: trackio.Table(data=data)}, step=step)

    def summary(self, values: Scalars, *, step: int) -> None:
        self.tracker.log({f"summary/{name}": value for name, value in values.items()}, step=step)

    def finish(self, status: str, code: int, *, step: int) -> None:
        self.tracker.log({"status": status}, step=step)
        self.tracker.finish()


TOOLS: dict[str, Callable[[Path, str | None], TrackingTool]] = {  # by the name in run.trackers, which is the package's
    "tensorboard": TensorBoardTool,
    "wandb": WandbTool,
    "mlflow": MlflowTool,
    "trackio": TrackioTool,
}


def flat_scalars(value: Any, name: str = "") -> Iterable[tuple[str, float | int | str | bool]]:
    """Every value of nested dicts under its dotted name. null is a text; lists are left out."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from flat_scalars(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str | int | float):
        yield name, value
    elif value is None:
        yield name, "null"
