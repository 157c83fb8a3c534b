"""Keeps what was trained where the run folder takes no more: on a full disk, or once it is gone."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.checkpoint.adapter import holds_adapter, save_adapter
from launcher.checkpoint.bundle import bundles_of
from launcher.checkpoint.files import sync
from launcher.errors import CheckpointError, DiskError, FolderError
from launcher.runtime.signals import deferring
from launcher.train.schedule_free import averages_in_place
from launcher.train.setup import Worker


@contextmanager
def rescuing(worker: Worker) -> Iterator[None]:
    """`rescue` around what writes files of the run, before other ranks hear of the error: it is they that end first."""
    try:
        yield
    except (DiskError, FolderError) as failure:
        rescue(worker, failure)
        raise


def rescue(worker: Worker | None, failure: BaseException) -> None:
    """To an error of the run's disk or folder add where the adapter is as it was trained until now: in the run folder,
    or saved elsewhere (run.rescue_dir). Does nothing for other errors, before the first step, and on ranks but 0."""
    if not isinstance(failure, DiskError | FolderError) or hasattr(failure, "__notes__"):
        return
    if worker is not None and worker.rank_info.is_main and "state" in vars(worker) and worker.state.step:
        with deferring():  # a launcher ends this process when another rank has ended
            with averages_in_place(worker.step.optimizer):
                note = _keep(worker, on_disk=isinstance(failure, DiskError))
            failure.add_note(note)


def _keep(worker: Worker, *, on_disk: bool) -> str:
    """Find or save the adapter; where it is. `on_disk`: the run folder is still there."""
    model, run, step = worker.built.peft, worker.folder, worker.state.step
    for folder in (run.adapter, *(bundle / "adapter" for bundle in bundles_of(run.checkpoints))):
        if holds_adapter(model, folder):
            return f"After step {step} the adapter is in {folder}."
    # In the run folder there may be room for it, though not for a checkpoint.
    named = worker.recipe.run.rescue_dir
    places: list[Callable[[], Path]] = [lambda: run.checkpoints] if on_disk else []
    places += [lambda: Path(named)] if named else []
    faults = []
    for find in (*places, lambda: Path(tempfile.gettempdir()), Path.cwd):  # the last two may be gone as well
        place: Path | str = "a folder that is gone"
        try:
            place = find()
            return f"After step {step} the adapter was saved in {_saved(worker, place)}: copy it from there."
        except Exception as error:  # of libraries too: whatever it is, the next place may do
            faults.append(f"{place}: {error}")
    return "\n".join([f"After step {step} the adapter could be saved nowhere:", *faults])


def _saved(worker: Worker, place: Path) -> Path:
    """Save the adapter in a new folder in `place`, read it back, and return the folder."""
    model, run = worker.built.peft, worker.folder
    place.mkdir(parents=place != run.checkpoints, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{run.path.name}-step-{worker.state.step}-", dir=place))
    try:
        save_adapter(model, worker.prepared.tokenizer, folder)
        sync(folder)
        if not holds_adapter(model, folder):
            raise CheckpointError("what was read back is not what was trained")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
