"""What mode=generate answered: plain frozen records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    text: str
    tokens: int
    elapsed_s: float
    ended: bool  # by a stop token, not by max_tokens


@dataclass(frozen=True)
class Answered:
    """One prompt with the trained model's answer and, where it was asked for, the base's."""

    prompt: str
    trained: Answer
    base: Answer | None = None
    expected: str | None = None  # the data's own answer
