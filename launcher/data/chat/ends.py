"""The token that stops generation closes every supervised turn.

A model stops at its stop tokens: the tokenizer's `eos_token`, those of generation_config.json, and the control token
with which the template ends a chat (generate and export stop there too). Without a generation_config.json any control
token that ends a turn is taken for one. A turn is closed by the first rule that holds:

    template     it ends in a stop token already                                Hello.<|eot_id|>
    next turn    a stop token follows, which opens the next turn                Hello.<|user|>
    eos          it ends the chat: a stop token is appended                     Hello.<|endoftext|>

Appended is what would open the next turn where that is a stop token, so that all answers end alike: behind an answer
the opening of a question, behind tool calls that of a result; else the tokenizer's eos_token.

Whitespace between turn and token is learned with it. A turn that none closes is counted, and a data set of such turns
is refused, as is one of which data.max_length cuts every answer: the model would never stop.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.named_templates import fitting_templates
from launcher.data.chat.turns import Span
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from launcher.records.counts import CUT_OFF, UNCLOSED, closed_key, closed_turns


class ClosedTurns(NamedTuple):
    """A chat's text and spans when its turns are closed, and the count of each: closed_key, or UNCLOSED."""

    text: str
    spans: list[Span]
    ends: tuple[str, ...]


class Ends:
    """Closes the turns of a template that ends a chat with the token `last`, "" if with none. `stop_ids`: of
    generation_config.json. `control`: finds control tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int], last: str, control: re.Pattern[str]
    ) -> None:
        eos = tokenizer.eos_token
        self._eos = str(eos) if eos else ""
        added = tokenizer.added_tokens_decoder
        self._known = {self._eos, *(str(added[index]) for index in stop_ids if index in added)} - {""}
        stops = sorted({*self._known, last} - {""}, key=len, reverse=True)
        self._follows = re.compile(r"\s*(" + ("|".join(map(re.escape, stops)) or "(?!)") + ")")
        self._control = control
        self._endings = frozenset(stops if stop_ids else [*stops, *map(str, added.values())])
        self._lengths = sorted({len(token) for token in self._endings}, reverse=True)

    def closing_behind(self, opening: str) -> str:
        """What closes a turn behind which the template would write this opening of the next."""
        return follows[0] if (follows := self._follows.match(opening)) else self._eos

    def close(self, text: str, spans: Sequence[Span], *, turns: int, closing: str) -> ClosedTurns:
        """`turns`: how many the spans are of; a template's own marks may give a turn several. `closing`: what
        `closing_behind` gives where the last span is of the chat's last message, else "".
        """
        closed, ends, one_each = list[Span](), list[str](), len(spans) == turns
        for number, (start, end) in enumerate(spans, 1):
            rule, stop = "template", self._ending_of(text[start:end])
            if stop and stop not in self._known and (reached := self._reached(text, start, end)):
                stop, end = reached[0], reached.end()
            if not stop and (follows := self._follows.match(text, end)):
                rule, stop, end = "next_turn", follows[1], follows.end()
            if not stop and closing and number == len(spans):
                rule, stop, text = "eos", closing.strip(), text + closing
                end = len(text)
            closed.append((start, end))
            if stop or one_each:
                ends.append(closed_key(rule, stop) if stop else UNCLOSED)
        return ClosedTurns(text, closed, (*ends, *[UNCLOSED] * (turns - len(ends))))

    def close_chat(self, text: str, closing: str) -> str:
        """A text that is learned as a whole and that an answer ends, with a stop token at its end. `closing`: as of
        `closing_behind`."""
        return text if self._ending_of(text) else text + closing

    def _reached(self, text: str, start: int, end: int) -> re.Match[str] | None:
        """The last stop token of the model in the run of control tokens that ends this span.

        What a template writes behind it, such as a generation prompt, is never reached.
        """
        for token in reversed(list(self._control.finditer(text, start, end))):
            if text[token.end() : end].strip():
                return None
            if token[0] in self._known:
                return token
            end = token.start()
        return None

    def _ending_of(self, text: str) -> str:
        body = text.rstrip()
        return next((body[-length:] for length in self._lengths if body[-length:] in self._endings), "")


def check_ends(
    counts: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, *, template: str, data: DataSection, longest: int
) -> None:
    """Raises DataError where no supervised turn of any chat ends with a stop token, or where every answer of chats and
    completions is cut before it does. `longest`: tokens of the longest row that is cut."""
    closed = closed_turns(counts)
    of_chats = any(rule not in ("completion", "text") for rule, _ in closed)
    if of_chats or not (counts.get(UNCLOSED) or (counts.get(CUT_OFF) and not closed)):
        return
    rule = "an answer must end with a token that stops generation, else the model never learns to stop."
    unclosed, cut = counts.get(UNCLOSED, 0), counts.get(CUT_OFF, 0)
    cut_off = f"data.max_length={data.max_length} cuts {cut:,} of {cut + unclosed:,} answers before their end"
    longer = f"Raise data.max_length (the longest row has {longest} tokens)"
    if not unclosed:
        split = "or set data.too_long=split to keep the rest of a row as another document"
        raise DataError(f"{rule}\nFound: {cut_off}.\n{longer}, {split}.")
    fitting = [name for name in fitting_templates(tokenizer) if name != template]
    eos = f"eos_token {tokenizer.eos_token}" if tokenizer.eos_token else "no eos_token"
    remedy = f"Set data.template={' or '.join(fitting)}, or use" if fitting else "Use"
    raise DataError(
        f"{rule}\nFound: {f'{cut_off}, and ' if cut else ''}none of {unclosed:,} answers does; the template is "
        f"{template}, the tokenizer has {eos}.\n{f'{longer}. ' if cut else ''}{remedy} a model whose tokenizer has an "
        "eos_token, and chats that an answer ends."
    )
