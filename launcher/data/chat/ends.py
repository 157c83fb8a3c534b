"""The token that stops generation closes every supervised turn.

A model stops at its stop tokens: the tokenizer's `eos_token`, those of generation_config.json, and the control token
with which the template ends a chat (generate and export stop there too). Without a generation_config.json any control
token that ends a turn is taken for one. A turn is closed by the first rule that holds:

    template     it ends in a stop token already                                Hello.<|eot_id|>
    next turn    a stop token follows, which opens the next turn                Hello.<|user|>
    eos          it ends the chat: the tokenizer's eos_token is appended        Hello.<|endoftext|>

Whitespace between turn and token is learned with it. A turn that none closes is counted, and a data set of such turns
is refused: the model would never stop.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.named_templates import fitting_templates
from launcher.data.chat.turns import Span
from launcher.errors import DataError
from launcher.records.counts import UNCLOSED, closed_key, closed_turns


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

    def close(self, text: str, spans: Sequence[Span], *, turns: int, answer_last: bool) -> ClosedTurns:
        """`turns`: how many the spans are of; a template's own marks may give a turn several. `answer_last`: the last
        span is of the chat's last message.
        """
        closed, ends = list[Span](), list[str]()
        for number, (start, end) in enumerate(spans, 1):
            rule, stop = "template", self._ending_of(text[start:end])
            if stop and stop not in self._known and (reached := self._reached(text, start, end)):
                stop, end = reached[0], reached.end()
            if not stop and (follows := self._follows.match(text, end)):
                rule, stop, end = "next_turn", follows[1], follows.end()
            if not stop and self._eos and answer_last and number == len(spans):
                rule, stop, text = "eos", self._eos, text + self._eos
                end = len(text)
            closed.append((start, end))
            if stop:
                ends.append(closed_key(rule, stop))
        return ClosedTurns(text, closed, (*ends, *[UNCLOSED] * (turns - len(ends))))

    def close_chat(self, text: str) -> str:
        """A text that is learned as a whole and that an answer ends, with a stop token at its end."""
        return text if self._ending_of(text) else text + self._eos

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


def check_ends(counts: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, *, template: str) -> None:
    """Raises DataError where no supervised turn of any chat ends with a stop token."""
    if not counts.get(UNCLOSED) or closed_turns(counts):
        return
    fitting = [name for name in fitting_templates(tokenizer) if name != template]
    eos = f"eos_token {tokenizer.eos_token}" if tokenizer.eos_token else "no eos_token"
    remedy = f"Set data.template={' or '.join(fitting)}, or use" if fitting else "Use"
    raise DataError(
        "an answer must end with a token that stops generation, else the model never learns to stop.\n"
        f"Found: none of {counts[UNCLOSED]:,} answers does; the template is {template}, the tokenizer has {eos}.\n"
        f"{remedy} a model whose tokenizer has an eos_token, and chats that an answer ends."
    )
