"""mode=generate: answers to prompts, or a chat in the terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.commands.finished_run import Invocation, located
from launcher.errors import LauncherError, RecipeError
from launcher.export.prompts import read_prompts
from launcher.recipe.run_options import GenerateOptions
from launcher.report import Screen, make_console
from launcher.report.console import literal
from launcher.report.pages import speed
from launcher.report.render import print_record
from launcher.runtime.clock import seconds_since
from launcher.runtime.environment import quick_imports
from launcher.runtime.failures import classified
from launcher.runtime.signals import Terminated

ANSWERS_SHOWN = 8  # of a file with prompts


def answer_prompts(options: GenerateOptions, invocation: Invocation) -> None:
    """Answer `prompt`, `prompts`, or what is typed."""
    info, console = invocation.rank_info, invocation.console
    prompts = Path(options.prompts).expanduser().absolute() if options.prompts else None
    if prompts and not prompts.is_file():
        raise RecipeError(f"prompts must be a file; {prompts} is {'a folder' if prompts.is_dir() else 'not there'}.")
    if prompts and not os.access(prompts.parent, os.W_OK):
        raise RecipeError(f"the answers are written beside prompts; {prompts.parent} cannot be written.")
    answers = prompts and prompts.with_name(f"{prompts.stem}.answers.jsonl")
    if answers and answers.exists():
        raise RecipeError(f"answers must not be overwritten; {answers} is there. Move or remove it.")
    place, source = located(options)
    rows, dropped = read_prompts(prompts, place.recipe.data) if prompts else ([], "")
    progress = console if prompts else make_console(sys.stderr)  # to stdout goes the answer alone, for a pipe
    with Screen(progress, clock=seconds_since()) as screen, _telling_what_is_left(answers), classified(info):
        screen.show("importing torch")
        with quick_imports():
            from launcher.export.generate import Answerer, answer_all, prompt_of
            from launcher.export.load_run import load_trained, open_run

        run = open_run(place, source, info)
        notes = [*run.notes, *([f"{prompts}: {dropped}"] if dropped else [])]
        screen.show("loading the model")
        answerer = Answerer(run, load_trained(run)[0], options)
        if answers:
            asked = [prompt_of(row, run) if isinstance(row, str) else row for row in rows]
            notes.append(_answer_file(answer_all(answerer, asked, answers), len(asked), answers, screen))
    for note in notes:
        progress.print(literal(note, "yellow"), soft_wrap=True)
    with classified(info):
        if options.prompt and options.base:
            print_record(console, answerer.answered(prompt_of(options.prompt, run)))
        if options.prompt and not options.base:
            _say(answerer, prompt_of(options.prompt, run).content, console)
        elif not prompts and not options.prompt:
            _chat(answerer, lambda text: prompt_of(text, run).content, console, base=options.base)


@contextmanager
def _telling_what_is_left(answers: Path | None) -> Iterator[None]:
    """Around what writes `answers`, a new file: whatever ends it early is told how many lines there are."""
    try:
        yield
    except (LauncherError, KeyboardInterrupt, Terminated) as end:
        if not (answers and answers.exists()):
            raise
        written = answers.read_text(encoding="utf-8").count("\n")
        left = f"{written} answers are in {answers}: move or remove it before these prompts are asked again"
        if not isinstance(end, LauncherError):
            raise type(end)(left) from None
        end.add_note(f"{left}.")
        raise


def _answer_file(answers: Iterator[Any], count: int, file: Path, screen: Screen) -> str:
    """Show the answers as they are written to `file`; returns what to say of them. Raises the first refusal where no
    prompt could be answered; the file is then removed."""
    refused = []
    for number, answered in enumerate(answers, 1):
        if isinstance(answered, LauncherError):
            refused.append(answered)
        shown = number <= ANSWERS_SHOWN and not isinstance(answered, LauncherError)
        screen.show(answered if shown else f"answered {number} of {count}")
    if len(refused) == count:
        file.unlink()
        raise refused[0]
    none = f"; {len(refused)} prompts have none, the first: {str(refused[0]).splitlines()[0]}" if refused else ""
    return f"{count - len(refused)} answers are in {file}{none}"


def _chat(answerer: Any, first: Callable[[str], Any], console: Console, *, base: bool) -> None:
    """Answer line by line until the input ends. A chat is kept whole. Without a template each line stands alone."""
    chat: list[dict[str, str]] = []
    asks = sys.stdin.isatty()
    if asks:
        console.print(Text("A line is a message; Ctrl-D ends.", "dim"))
    while True:
        if asks:
            console.print(Text("> ", "bold cyan"), end="")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        content = first(line.strip())
        if isinstance(content, str):
            _say(answerer, content, console, base=base)
            continue
        chat += content
        answer = _say(answerer, chat, console, base=base)
        chat.append({"role": "assistant", "content": answer})


def _say(answerer: Any, content: Any, console: Console, *, base: bool = False) -> str:
    """Print an answer as it grows, and its speed; with `base` the base's too. Returns the trained model's."""
    texts = []
    for side in (False, True) if base else (False,):
        if base:
            console.print(Text("base: " if side else "trained: ", "cyan"), end="")
        answer = answerer.answer(
            content, base=side, write=lambda text: console.print(literal(text), end="", soft_wrap=True)
        )
        console.print()
        told = console if console.is_terminal else make_console(sys.stderr)  # an answer may go into a pipe
        told.print(Text(speed(answer), "dim"))
        texts.append(answer.text)
    return str(texts[0])
