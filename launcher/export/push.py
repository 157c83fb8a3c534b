"""Puts what a run or an export left, with its card, into a repository of the hub: all in one commit, or nothing.

Not `upload_folder`: it names what to leave out, and with Xet it splits a large folder into several commits. Here each
file is named, and `create_commit` makes one. Imports no torch.
"""

import fnmatch
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import write_text, writing
from launcher.checkpoint.folder import RunFolder
from launcher.credentials import remember, shortened
from launcher.errors import LauncherError, RecipeError
from launcher.export.card import CARD, OUR_TAG, UNPROVEN_TAG, run_card
from launcher.export.place import UNPROVEN_SUFFIX, find_run
from launcher.recipe.hub_request import answered
from launcher.recipe.run_options import PushOptions
from launcher.records.push import PushRecord

PUSHED = (  # what stock code loads, and what a reader needs; nothing else of a folder leaves this machine
    *(CARD, "LICENSE*", "NOTICE*", "Modelfile", "config.json", "generation_config.json", "adapter_config.json"),
    *("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("*.gguf", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
PLACEHOLDER = "# Model Card for Model ID"  # in PEFT's own card, which says nothing
AGAIN = "Run the same command again: it commits all files at once, and until then none."


@dataclass(frozen=True)
class PushPlan:
    """What will be pushed."""

    folder: Path
    files: tuple[str, ...]  # by path in the folder, which is that in the repository
    left_out: tuple[str, ...]
    unproven: bool
    notes: tuple[str, ...]


def plan_push(options: PushOptions) -> PushPlan:
    """Find the folder and its card; a run's card that is missing is made. Changes nothing else.

    Raises RecipeError for what must not be pushed, CheckpointError for a run that goes on.
    """
    path = Path(options.run).expanduser().absolute()
    if path.name.endswith((UNPROVEN_SUFFIX, ".part")):
        raise RecipeError(
            f"what is pushed must be the trained model; the proof of {path} failed, or it was not finished.\n"
            "Export it again; a folder that is no proven model is not pushed."
        )
    of_run = _has_run(path) or (path.name == "adapter" and _has_run(path.parent))
    exported = not of_run and _card_tags(path) is not None
    folder, broken = (path, f"its card has the tag {UNPROVEN_TAG}") if exported else _adapter_of(path)
    tags = _card_tags(folder) or []
    needed = [OUR_TAG, *([UNPROVEN_TAG] if broken and not exported else [])]
    if not set(needed) <= set(tags):
        raise RecipeError(
            f"a card that is pushed must have the tags {', '.join(needed)}; that of {folder} has "
            f"{', '.join(tags) or 'none that can be read'}.\nAdd them, or remove {CARD}: it is then made again."
        )
    unproven = UNPROVEN_TAG in tags
    if unproven and not options.unproven:
        raise RecipeError(
            f"what is pushed must be proven; of {path} this does not hold: {broken or tags}.\n"
            "To push it all the same, with a card that says so, give unproven=true."
        )
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    plain = [name for name in names if not _is_link(folder, name)]
    files = [name for name in plain if any(_matches(name, pattern) for pattern in PUSHED)]
    left_out = tuple(name for name in names if name not in files)
    return PushPlan(folder, tuple(files), left_out, unproven, tuple(_base_note(folder)))


def push(plan: PushPlan, options: PushOptions) -> Iterator[str | PushRecord]:
    """Make the repository if there is none, and commit; yields the names of phases and, last, the record.

    Raises RecipeError where the hub refuses or does not answer; then nothing was committed.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if "HF_HUB_DISABLE_XET" not in os.environ:  # Xet has logs, caches and several commits of its own: docs/hub.md
        constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.utils.disable_progress_bars()
    started, to = time.monotonic(), options.to
    yield "asking the hub"
    with _telling(to):
        api = HfApi(token=_token())
        answered(api.whoami)
        notes = [*plan.notes, *_make_repository(api, plan, options)]
    size = {name: (plan.folder / name).stat().st_size for name in plan.files}
    yield f"uploading {len(size)} files, {sum(size.values()) / 2**20:,.0f} MiB"
    operations = [CommitOperationAdd(name, plan.folder / name) for name in plan.files]
    with _telling(to), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        commit = api.create_commit(to, operations, commit_message="Model, tokenizer and card by qlora-launcher")
    yield PushRecord(
        folder=str(plan.folder),
        repository=to,
        url=f"{api.endpoint}/{to}",
        commit=str(commit.oid),
        commit_url=str(commit.commit_url),
        private=options.private,
        unproven=plan.unproven,
        files=size,
        left_out=plan.left_out,
        elapsed_s=time.monotonic() - started,
        notes=(*notes, *(" ".join(str(one.message).split()) for one in warned if one.category is UserWarning)),
    )


def _has_run(folder: Path) -> bool:
    """Whether its report.json is a run's: those of modes (an export's report=) name theirs. One that cannot be read is
    taken for a run's, whose reader says what is wrong with it."""
    file = folder / "report.json"
    try:
        return file.exists() and "mode" not in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return True


def _adapter_of(path: Path) -> tuple[Path, str]:
    """The adapter's folder of a finished run, which has a card now, and the claims that do not hold."""
    place = find_run(path)
    if not place.finished or place.adapter != place.folder / "adapter":
        raise RecipeError(
            "run must be a finished run or an exported folder, whose cards say what they are; "
            f"{path} is a checkpoint.\nLet the run come to its end (run.resume=auto), or export it."
        )
    RunFolder(place.folder).check_unused()
    report = json.loads((place.folder / "report.json").read_text(encoding="utf-8"))
    broken = [verdict["claim"] for verdict in report["verdicts"] if not verdict["holds"]]
    if not report["adapter"]:
        raise RecipeError(
            f"what is pushed must be proven; the adapter of {place.folder} is not: {'; '.join(broken)}.\nTrain again."
        )
    card = place.adapter / CARD
    if not card.exists() or PLACEHOLDER in card.read_text(encoding="utf-8", errors="replace"):
        with writing(place.adapter, what="The card"):
            write_text(card, run_card(report))
    return place.adapter, "; ".join(broken)


def _card_tags(folder: Path) -> list[str] | None:
    """The tags of a card of ours; None where the folder has none that can be read."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        tags = list(card.data.to_dict().get("tags") or [])
    except Exception:  # none, or of any form
        return None
    return tags if OUR_TAG in tags else None


def _matches(name: str, pattern: str) -> bool:
    """As a shell matches: unlike fnmatch's, no * takes in a folder."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _is_link(folder: Path, name: str) -> bool:
    """Whether the file, or a folder that it lies in, is a link: it may name anything of this machine."""
    file = folder / name
    return any(part.is_symlink() for part in (file, *file.parents) if folder in part.parents)


def _base_note(folder: Path) -> Iterator[str]:
    file = folder / "adapter_config.json"
    if file.is_file() and '"base_model_name_or_path": "/' in file.read_text(encoding="utf-8", errors="replace"):
        yield "adapter_config.json names the base by its path on this machine: who loads the adapter names a base"


def _token() -> str:
    """From the standard places of huggingface_hub. It is masked from now on in whatever is printed or written."""
    from huggingface_hub import constants, get_token

    token = get_token()
    if not token:
        raise RecipeError(
            "mode=push needs a token of the hub; there is none in HF_TOKEN, nor in the login file "
            f"{constants.HF_TOKEN_PATH}.\nRun `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    remember(token)
    return token


def _make_repository(api: Any, plan: PushPlan, options: PushOptions) -> Iterator[str]:
    """Make it, or see that the one which is there may take this model; what to say of it."""
    to, private = options.to, options.private
    api.create_repo(to, private=private, exist_ok=True)  # asks for it where the token may not make any
    found = api.model_info(to)
    names = {sibling.rfilename for sibling in found.siblings or []} - {".gitattributes"}
    if names and OUR_TAG not in (found.tags or []):
        raise RecipeError(
            f"to must be a new repository, an empty one, or one that this launcher filled; {to} holds another model "
            f"({len(names)} files).\nName another."
        )
    if bool(found.private) != private:
        raise RecipeError(
            f"private={str(private).lower()} must be true of the repository; {to} is there already and is "
            f"{'private' if found.private else 'public'}.\nGive private={str(not private).lower()}, or name another."
        )
    if others := sorted(names - set(plan.files)):
        yield f"the repository keeps from before: {', '.join(others)}"


@contextmanager
def _telling(to: str) -> Iterator[None]:
    """What the client raises, of a dozen kinds, becomes one message: rule, what was found, remedy."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        raise RecipeError(_told(error, to)) from None


def _told(error: Exception, to: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    responses = (getattr(one, "response", None) for one in causes)
    status = next((response.status_code for response in responses if response is not None), 0)
    reason = shortened(" ".join(str(causes[-1] if not status else error).split()) or type(error).__name__, 250)
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return "mode=push needs the hub; HF_HUB_OFFLINE says that there is none. Unset it."
    if status == 401:
        return f"the hub must know the token; it does not (401): {reason}\nRun `hf auth login`, or set HF_TOKEN anew."
    if status in (403, 404):
        remedy = "Use a token that may write, and an owner that it belongs to."
        return f"the token must be allowed to write to {to}; it is not ({status}): {reason}\n{remedy}"
    if status in (400, 413, 422):
        return f"the hub must accept what is pushed to {to}; it does not: {reason}\nName another, or correct the card."
    return f"a push must come to its end; that to {constants.ENDPOINT} did not: {reason}\n{AGAIN}"
