"""Where a template without generation blocks begins and ends the assistant's turns.

    prompt = render(messages[:i], generation prompt)     <bos>[user]Hi[end][assistant]
    text   = render(messages)                            <bos>[user]Hi[end][assistant]Hello.[end]\\n[user]Bye[end]\\n
    span   = what follows the prompt in text, up to the last control token of the turn      Hello.[end]

So an empty thinking block that a template writes into the turn is supervised. A template may write earlier turns in
another way than the last one (without their thinking): spans lie in `text`, so this does no harm. Where the generation
prompt ends in an opening ("<think>\\n") that the turn in `text` lacks, the span begins before the opening.

A mark behind each content, in one more rendering, shows where the content ends in `text`. The template's ending
follows: what it writes of a turn whatever comes next. It is found on a sample chat:

    [end]\\n[user]thank you    another message follows
    [end]\\n[eos]              the chat ends
    [end]                     what both have: up to the last control token, or the leading whitespace without one

A turn with tool calls has its mark behind the name of the last call, and ends behind the arguments. So the ending of
such a turn is found on a short chat of its own: the chat's beginning, the turn, and what follows; again what is written
whether the chat goes on or ends, which may have nothing more than control tokens. The same is done for a turn that no
user's message follows, where it lacks the sample's ending.

The turn that ends the chat has all that is written up to the last control token. No character of the next turn is ever
in a span. Where a template has no ending (the next turn's opening ends a turn), a span is the content alone.

Long chats: rendering a prompt for every turn would take time with the square of their turns. So prompts are rendered
for ever fewer turns (the 1st, 2nd, 3rd, 5th, 9th, ... and the last), which shows templates that rewrite what came
before. In between, a turn begins behind the only `lead` there: what the template writes between the sample's question
and its answer.

Where a template moves tools to the last question, the prompt is no beginning of `text`. So with tools a turn then
begins where the message before ends, behind what the prompt has there.

A chat's first message has no prompt, since templates take no empty chat. If it is the assistant's, it begins behind the
only `header` there: the lead without the question's ending.
"""

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix
from typing import Any

from launcher.data.chat.spelled_out import BEGIN, END, Messages
from launcher.data.read.unused import REASONING

Span = tuple[int, int]  # half-open range of characters
Apply = Callable[..., str]  # (messages, prompt=False) -> text

SYSTEM = {"role": "system", "content": "be brief"}
SAMPLE = ("3141", "5926", "5358")  # user, assistant, user; digits, since templates may change letters
BLANK_OR_THOUGHTS = re.compile(r"(\A|[>\]])\s*\Z")
THOUGHTS_ALONE = re.compile(r"[>\]]\s*\Z")  # what a content that is nothing else ends like; others do too


def may_be_unwritten(message: dict[str, Any]) -> bool:
    """Whether a message may be thoughts alone, which templates leave out."""
    return not message.get("tool_calls") and bool(BLANK_OR_THOUGHTS.search(message["content"]))


class UnshownTurn(Exception):
    """The template does not show where the message of this index begins or ends."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True)
class TurnFormat:
    """How a template writes an assistant turn that a user's message follows.

    `lead`: what it writes between the question and the turn. `header`: the lead without what ends the question.
    `opening`: what the generation prompt has behind that, and the turn has not. `ending`: what ends the turn; None if
    unknown. `last`: the token with which the turn ends where it ends the chat, "" without one.
    """

    lead: str = ""
    header: str = ""
    opening: str = ""
    ending: str | None = None
    last: str = ""


class Turns:
    """Finds assistant turns in the texts that `apply` renders. `end_tokens`: what may end a turn."""

    def __init__(self, apply: Apply, *, control: re.Pattern[str], end_tokens: tuple[str, ...]) -> None:
        self.apply, self._control, self._end_tokens = apply, control, end_tokens
        self._may_move = False

    def with_apply(self, apply: Apply) -> "Turns":
        """The same, for chats that are rendered with tools: the sample, rendered without, is shared."""
        _ = self._format
        twin = copy(self)
        twin.apply, twin._may_move = apply, True
        return twin

    def spans(self, messages: Messages, turns: Sequence[int], text: str) -> list[Span]:
        """The span of each of these messages in `text`, which is their chat; it may be empty.

        Raises UnshownTurn, and what the template raises.
        """
        content_ends = self._content_ends(messages, turns, text)
        spans: list[Span] = []
        last_end, last_turn = 0, -1
        for number, turn in enumerate(turns):
            content_end = content_ends.get(turn, len(text))
            leads = sum(message["role"] == "assistant" for message in messages[last_turn + 1 : turn + 1])
            start = self._behind_lead(text, (last_end, content_end), leads)
            if start is not None and messages[turn].get("reasoning_content", END).strip() in text[last_end:start]:
                start = None  # a lead within the turn: some write thoughts as a message of their own
            if number & (number - 1) == 0 or turn == turns[-1] or start is None:
                start = self.begin(messages, turn, text)
            end: int | None
            if turn not in content_ends:
                end = start + len(self._up_to_end_token(text[start:]))
            elif messages[turn].get("tool_calls"):
                end = self._own_end(messages, turn, text, content_end)
            else:
                end = self._turn_end(messages[turn]["content"], text, content_end)
                if end == content_end and messages[turn + 1]["role"] != "user":
                    end = self._own_end(messages, turn, text, content_end) or end
            is_written = self._control.sub("", text[start:end]).strip()
            if start > content_end or end is None or not (is_written or may_be_unwritten(messages[turn])):
                raise UnshownTurn(turn)
            spans.append((start, end))
            last_end, last_turn = content_end, turn
        return spans

    def begin(self, messages: Messages, turn: int, text: str) -> int:
        """Where the model begins to write this turn in `text`. Raises UnshownTurn, and what the template raises."""
        if turn == 0:
            return self._begin_of_chat(messages, text)
        prompt = self.apply(messages[:turn], prompt=True)
        if not text.startswith(prompt):
            prompt = prompt.removesuffix(self._format.opening)
        if text.startswith(prompt):
            return len(prompt)
        if not self._may_move:
            raise UnshownTurn(turn)
        return self._behind_message(messages, turn, text)

    def _begin_of_chat(self, messages: Messages, text: str) -> int:
        """Where the model begins to write the chat's first message: behind the header, whatever the content."""
        header, opening = self._format.header, self._format.opening
        head = self.apply([{**messages[0], "content": SAMPLE[1]}, *messages[1:]]).partition(SAMPLE[1])[0]
        start = head.find(header) + len(header)
        if not header or head.count(header) != 1 or not text.startswith(head[:start]):
            raise UnshownTurn(0)
        return start + len(opening) if text.startswith(opening, start) else start

    def _content_ends(self, messages: Messages, turns: Sequence[int], text: str) -> dict[int, int]:
        """Where the contents of these messages end in `text`, without the chat's last message."""
        inner = [turn for turn in turns if turn + 1 < len(messages)]
        if not inner:
            return {}
        for before_whitespace in (False, True):
            ends, written = self._read_marks(messages, inner, before_whitespace)
            if written == text and len(ends) == len(inner):
                return ends
        raise UnshownTurn(next((turn for turn in inner if turn not in ends), inner[0]))

    def _read_marks(
        self, messages: Messages, inner: Sequence[int], before_whitespace: bool
    ) -> tuple[dict[int, int], str]:
        """Where the marks of these messages are in the chat, and the chat without marks."""
        marked = list(messages)
        for turn in inner:
            marked[turn] = _marked(messages[turn], f"{BEGIN}{turn}{END}", before_whitespace)
        pieces = re.split(f"{BEGIN}([0-9]+){END}", self.apply(marked))
        ends: dict[int, int] = {}
        for turn, position in zip(map(int, pieces[1::2]), accumulate(map(len, pieces[::2])), strict=False):
            if turn not in ends or not messages[turn].get("tool_calls"):
                ends[turn] = position
        return ends, "".join(pieces[::2])

    def _own_end(self, messages: Messages, turn: int, text: str, mark: int) -> int | None:
        """The end of a turn whose mark is at `mark`, found on a short chat that it ends and on one that goes on."""
        begin = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0) + 1
        follows = turn + 1
        while follows < len(messages) - 1 and messages[follows]["role"] == "tool":
            follows += 1
        for head in (messages[: min(begin, turn)], messages[:turn]):  # whole where the template refuses the short one
            for before_whitespace in (False, True):
                chat = [*head, _marked(messages[turn], BEGIN + END, before_whitespace)]
                try:
                    rendered = self.apply(chat), self.apply([*chat, *messages[turn + 1 : follows + 1]])
                except Exception:  # a template's own
                    continue
                (_, is_there, last), (_, goes_on, followed) = (_at_mark(item, messages[turn]) for item in rendered)
                ending = self._ending(followed, last)
                is_whole = ending.strip() and not self._control.sub("", last.removeprefix(ending)).strip()
                if is_there and goes_on and is_whole and text.startswith(ending, mark):
                    return mark + len(ending)
        return None

    def _behind_message(self, messages: Messages, turn: int, text: str) -> int:
        """Where a turn begins behind the message before it, as it does in its prompt."""
        before = _marked(messages[turn - 1], BEGIN + END, False)
        chat = [*messages[: turn - 1], before]
        lead = _at_mark(self.apply(chat, prompt=True), before)[2]
        head, mark, tail = _at_mark(self.apply([*chat, *messages[turn:]]), before)
        tail = tail.replace(BEGIN + END, "")
        for start in (lead, lead.removesuffix(self._format.opening)):
            if mark and head + tail == text and start.strip() and tail.startswith(start):
                return len(head) + len(start)
        raise UnshownTurn(turn)

    def _behind_lead(self, text: str, between: Span, number: int) -> int | None:
        """The end of the last of exactly `number` leads, and of the opening behind it."""
        lead, opening = self._format.lead, self._format.opening
        if not lead or text.count(lead, *between) != number:
            return None
        start = text.rfind(lead, *between) + len(lead)
        return start + len(opening) if text.startswith(opening, start) else start

    def _turn_end(self, content: str, text: str, content_end: int) -> int | None:
        """The end of a turn whose content ends at `content_end`, but for whitespace, which some templates trim."""
        if self._format.ending is None:
            return None
        whitespace = content[len(content.rstrip()) :]
        for ending in (whitespace + self._format.ending, self._format.ending):
            if text.startswith(ending, content_end):
                return content_end + len(ending)
        return content_end

    def _up_to_end_token(self, text: str) -> str:
        """Without the whitespace after an end token."""
        body = text.rstrip()
        return body if body.endswith(self._end_tokens) else text

    @property
    def last_token(self) -> str:
        """The token with which a turn ends that ends the chat; "" without one."""
        return self._format.last

    @cached_property
    def _format(self) -> TurnFormat:
        """Found on a sample chat, with a system message if it must be; the default for a template that refuses both."""
        roles = ("user", "assistant", "user")
        sample = [{"role": role, "content": content} for role, content in zip(roles, SAMPLE, strict=True)]
        for system in ([], [SYSTEM]):
            try:
                question, answered, followed = (self.apply(system + sample[:end]) for end in (1, 2, 3))
                prompt = self.apply(system + sample[:1], prompt=True)
                return self._format_of(question, answered, followed, prompt)
            except Exception:  # a template's own, or ValueError: it does not write the contents
                continue
        return TurnFormat()

    def _format_of(self, question: str, answered: str, followed: str, prompt: str) -> TurnFormat:
        shared = commonprefix([prompt, followed])
        opening = prompt[len(shared) :] if shared.startswith(question) else ""
        lead = _behind(SAMPLE[0], prompt.removesuffix(opening))
        rest = _behind(SAMPLE[1], followed)
        endings = [self._ending(rest, _behind(*pair)) for pair in ((SAMPLE[1], answered), (SAMPLE[0], question))]
        ending = next((ending for ending in endings if ending.endswith(self._end_tokens)), endings[0])
        question_end = self._ending(lead, _behind(SAMPLE[0], question))
        tail = _behind(SAMPLE[1], answered).rstrip()
        last = max((token for token in self._end_tokens if tail.endswith(token)), key=len, default="")
        return TurnFormat(lead, lead.removeprefix(question_end).lstrip(), opening, ending, last)

    def _ending(self, followed: str, last: str) -> str:
        """What a turn ends in both where another message follows and where the chat ends."""
        shared = commonprefix([followed, last])
        if shared != last:  # not to be cut within a control token
            tokens = [match.end() for match in self._control.finditer(followed) if match.end() <= len(shared)]
            shared = shared[: tokens[-1] if tokens else len(shared) - len(shared.lstrip())]
        return self._up_to_end_token(shared)


def _at_mark(text: str, message: dict[str, Any]) -> tuple[str, str, str]:
    """What stands before the mark of this message, the mark, and what follows. Results may have the name of a call."""
    return text.partition(BEGIN + END) if message.get("tool_calls") else text.rpartition(BEGIN + END)


def _marked(message: dict[str, Any], mark: str, before_whitespace: bool) -> dict[str, Any]:
    """The message with a mark behind its last call's name, else its content, else its thoughts. Templates trim
    contents, so a mark is put before the whitespace of a content; of thoughts alone, behind it too: then it is all that
    is left of them.
    """
    content, calls = message["content"], message.get("tool_calls")
    if calls:
        function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + mark}
        return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
    if not content.strip() and "reasoning_content" in message:
        return {**message, **dict.fromkeys(REASONING, message["reasoning_content"].rstrip() + mark)}
    body = content.rstrip() if before_whitespace or not THOUGHTS_ALONE.search(content) else content
    return {**message, "content": body + mark + content[len(body) :]}


def _behind(content: str, text: str) -> str:
    return text[text.rindex(content) + len(content) :]
