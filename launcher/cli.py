"""The command line: words -> a command, which runs or prints; errors -> a message and an exit code (docs/run-files.md).

torch is imported only once the recipe is known to be good: a mistyped key is answered at once.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from launcher.api import make_request, train
from launcher.checkpoint.files import write_json
from launcher.commands.new_recipe import own_recipe
from launcher.commands.run_command import run_command
from launcher.credentials import masked_record
from launcher.data.read.rows import ReadingProgress
from launcher.errors import SHARED_CODES, ContractError, DataError, LauncherError, RecipeError
from launcher.preflight.lines import Checks
from launcher.preflight.mode import check
from launcher.proof.bench.compare import bench
from launcher.proof.bench.processes import ChildFailed
from launcher.recipe.command_line import parse
from launcher.recipe.help import print_request
from launcher.recipe.load import Resolved, resolve
from launcher.recipe.own_recipe import OWN_RECIPES
from launcher.recipe.run_options import OPTIONS_OF
from launcher.records.check import CheckRecord
from launcher.records.run import Phase
from launcher.report import Screen, make_console
from launcher.report import error as print_error
from launcher.report.pages.explanations import explanations
from launcher.report.pages.page import Page
from launcher.report.render import print_page
from launcher.runtime.clock import seconds_since
from launcher.runtime.environment import check_current_folder, quick_imports
from launcher.runtime.failures import classified, code_and_reason
from launcher.runtime.parent import under_launcher
from launcher.runtime.ranks import RankInfo, rank_info
from launcher.runtime.rendezvous import tell_failure
from launcher.runtime.signals import Terminated, listen, release_process
from launcher.runtime.streams import prepare_standard_streams
from launcher.train.request import Request


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Every failure meant for the user is a message, not a traceback."""
    prepare_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    listen()
    info, trains = RankInfo(0, 0, 1, 1), False
    try:
        info = rank_info()
        check_current_folder()
        console = make_console(None if info.is_main else io.StringIO())
        if print_request(arguments, console=console):
            return 0
        options = parse(arguments).options
        if (word := options["recipe"]) in OWN_RECIPES:
            own_recipe(arguments, word, info, console)
        elif options["mode"] in OPTIONS_OF:
            run_command(arguments, info, console)
        else:
            resolved = resolve(arguments)
            trains = resolved.mode == "train"
            COMMANDS[resolved.mode](resolved, info, console)
        return 0
    except LauncherError as error:
        _print_failure(error, info)
        if trains and info.local_world_size < info.world_size:
            release_process(error.code)  # its launcher ends it when another rank of this machine has told the same
            tell_failure(info, error)
        return error.code
    except (KeyboardInterrupt, Terminated) as stop:
        code, reason = code_and_reason(stop)
        _print_error((f"rank {info.rank}: " if info.world_size > 1 else "") + reason, code)
        return code


def _train(resolved: Resolved, info: RankInfo, console: Console) -> None:
    train(make_request(resolved, info, trains=True), console, report_copy=resolved.report)


def _check(resolved: Resolved, info: RankInfo, console: Console) -> None:
    if not info.is_main:  # one process checks for all of its machine
        return
    checks, record = Checks(), None
    with Screen(console, clock=seconds_since()) as screen, classified(info):
        for record in check(resolved, info, checks):
            screen.show(record)
        if resolved.report and isinstance(record, CheckRecord):
            write_json(resolved.report, record.as_report())
    checks.refuse(shown=True)


def _preview(resolved: Resolved, info: RankInfo, console: Console) -> None:
    if not info.is_main:  # one process sees all there is to see
        return
    request = make_request(resolved, info)
    with Screen(console, clock=seconds_since()) as screen, classified(info):
        progress = ReadingProgress()
        screen.show(Phase("preparing the data", progress))
        with quick_imports():
            from launcher.data.occurrences import with_occurrences
            from launcher.data.prepare import prepare
            from launcher.data.preview import preview_record
            from launcher.data.vocabulary import fit_vocabulary
            from launcher.model.family_choice import family_of
            from launcher.model.load import load_config, load_stop_ids, load_tokenizer
            from launcher.model.token_ids import token_ids_of
            from launcher.model.token_vectors import stored_vectors, untrained_notes

        recipe, name, source = resolved.recipe, resolved.name, request.source
        config = load_config(source, recipe.model)
        auto = recipe.model.family == "auto"
        family_of(config, max_length=recipe.data.max_length, auto=auto)  # refuses what training refuses
        tokenizer = load_tokenizer(source, recipe.model, stand_in=request.shipped / "tiny" / "base")
        token_ids = token_ids_of(recipe.lora.trainable_tokens, tokenizer, vocabulary=config.vocab_size)
        stop_ids = load_stop_ids(source, recipe.model)
        data = prepare(recipe.data, tokenizer, seed=recipe.train.seed, stop_ids=stop_ids, progress=progress)
        fault: DataError | None = None
        try:
            data, used = fit_vocabulary(data, tokenizer, vocabulary=config.vocab_size)
            data = with_occurrences(data, tokenizer, token_ids)
            if vectors := stored_vectors(source, config, recipe.model):
                notes = untrained_notes(*vectors, tokenizer, **vars(used.without(token_ids)))
                data = replace(data, notes=notes + data.notes)
        except DataError as error:  # after the blocks, which show where the token stands
            fault = error
        shown: dict[str, Any] = {"recipe": recipe, "name": name, "source": source, "blocks": resolved.blocks}
        screen.show(preview_record(data, tokenizer, **shown, world_size=info.world_size))
    if fault:
        raise fault


def _parity(resolved: Resolved, info: RankInfo, console: Console) -> None:
    def events(request: Request) -> Iterator[Any]:
        yield "importing torch"
        with quick_imports():
            from launcher.proof.parity import parity

        yield from parity(request)

    _compare(events, resolved, info, console)


def _bench(resolved: Resolved, info: RankInfo, console: Console) -> None:
    record = _compare(bench, resolved, info, console)
    for name, side in (("naive", record.naive), ("plain", record.plain)):
        if side and side.failure and not side.out_of_memory:
            raise ChildFailed(f"{name} must come to its end to be compared; it did not: {side.failure}.")


def _compare(events: Callable[[Request], Iterator[Any]], resolved: Resolved, info: RankInfo, console: Console) -> Any:
    """The record that `events` ends with, written to report=PATH; all goes to the console. One process only.

    Raises ContractError where a verdict of the record does not hold.
    """
    if info.world_size > 1:
        raise RecipeError(
            f"mode={resolved.mode} runs in one process; {info.world_size} were started. "
            f"Run python launcher/main.py recipe={resolved.name} mode={resolved.mode}."
        )
    request = make_request(resolved, info)
    record: Any = None
    with Screen(console, clock=seconds_since()) as screen, classified(info):
        for record in events(request):
            screen.show(record)
        if resolved.report:
            write_json(resolved.report, record.as_report())
    if not record.holds:
        raise ContractError(record.failure)
    return record


COMMANDS: dict[str, Callable[[Resolved, RankInfo, Console], None]] = {  # by mode; help.py answers the others
    "train": _train,
    "check": _check,
    "preview": _preview,
    "parity": _parity,
    "bench": _bench,
}


def _print_failure(error: LauncherError, info: RankInfo) -> None:
    """Print an error once where all ranks have it, and with the rank's number where it is this rank's own."""
    if error.rank is not None:  # who met it or found it has printed it
        return
    shared = error.code in SHARED_CODES
    reporter = error.reporter if error.reporter is not None else 0 if shared else info.local_rank
    if info.local_rank == reporter:
        prefix = f"rank {info.rank}: " if info.world_size > 1 and not shared else ""
        message, page = str(error), Page()
        if isinstance(error, ContractError):
            message, page = error.brief, Page([explanations([(info.rank, error.explanations)])])
        _print_error(prefix + message, error.code, masked_record(page))


def _print_error(message: str, code: int, page: Page | None = None) -> None:
    """The page stands above the message; of its sections those that hold something."""
    console = make_console(sys.stderr)
    print_error(console, message, code, framed=under_launcher(), above=lambda: print_page(console, page or Page()))
