"""A tokenizer as GGUF expresses it: tokens with their kinds, merges, and the name of the pre-tokenizer.

llama.cpp has a pre-tokenizer's regular expression in its code, by name. Its converter finds the name from a hash of
the ids of one text, which a new vocabulary changes; here it is found from the expression in the tokenizer itself. What
llama.cpp has no name for would be split otherwise than in training: it is refused.
"""

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from launcher.export.load_run import OpenedRun

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
SPLITS = {  # regular expression -> llama.cpp's name, and whether a whole word of the vocabulary is taken without merges
    rf"{WORD_SPLIT}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}": ("llama-bpe", True),  # Llama 3
    rf"{WORD_SPLIT}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}": ("qwen2", False),  # Qwen 2 and 3
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}": ("tekken", True),  # Mistral Nemo and later
}
GPT2 = ("gpt-2", False)  # the expression that is built into ByteLevel
STOP_KEYS = ("eos", "eot", "eom")  # llama.cpp ends an answer at each


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    tokens: list[str]  # by id, as many as the model has
    kinds: list[TokenType]
    merges: list[str]
    pre: str  # llama.cpp's name of the pre-tokenizer
    bos: bool  # whether a text begins with the BOS token
    eos: bool
    stops: tuple[int, ...]  # as STOP_KEYS
    template: str | None  # Jinja, as it was trained with
    ids: dict[str, int | None]  # of the other special tokens, by GGUF's names
    notes: tuple[str, ...]

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")  # byte-level BPE
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for key, token in {**self.ids, **dict(zip(STOP_KEYS, self.stops, strict=False))}.items():
            if token is not None:
                writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
        writer.add_add_bos_token(self.bos)
        writer.add_add_eos_token(self.eos)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(run: OpenedRun) -> tuple[Vocabulary | None, list[str]]:
    """The vocabulary, and what of the tokenizer GGUF cannot express, in words: either is empty."""
    tokenizer: Any = run.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, size, stops = spec["model"], run.config.vocab_size, _stops(run)
    pre, ignore_merges = _pre_tokenizer(spec["pre_tokenizer"])
    added = {token["id"]: token for token in spec["added_tokens"]}
    stripped = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    wrong = {
        "a tokenizer that is no byte-level BPE": model["type"] != "BPE" or bool(model.get("byte_fallback")),
        "the tokenizer's pre-tokenizer, for which llama.cpp has no name": not pre,
        f"ignore_merges={model.get('ignore_merges')} with the pre-tokenizer {pre}": bool(pre)
        and bool(model.get("ignore_merges")) != ignore_merges,
        "the tokenizer's normalizer": spec["normalizer"] not in (None, {"type": "NFC"}),
        f"the space around {', '.join(stripped[:3])}": bool(stripped),
        f"{len(by_id):,} tokens for {size:,} embeddings": max(by_id) >= size,
        f"{len(stops)} stop tokens (it has {len(STOP_KEYS)})": len(stops) > len(STOP_KEYS),
    }
    if found := [what for what, holds in wrong.items() if holds]:
        return None, found[:1]  # the first explains the others
    text = tokenizer("a")["input_ids"]
    vocabulary = Vocabulary(
        tokens=[by_id.get(id_, f"[PAD{id_}]") for id_ in range(size)],
        kinds=[_kind(id_, by_id, added) for id_ in range(size)],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        pre=pre,
        bos=text[0] == tokenizer.bos_token_id,
        eos=text[-1] == tokenizer.eos_token_id,
        stops=stops,
        template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        ids={"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id},
        notes=(
            "llama.cpp does not compose characters (NFC), as the tokenizer does: those written as two get other tokens",
        )
        if spec["normalizer"]
        else (),
    )
    return vocabulary, []


def _pre_tokenizer(spec: dict[str, Any] | None) -> tuple[str, bool]:
    """llama.cpp's name, "" where it has none, and its ignore_merges."""
    match spec:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return SPLITS.get(expression, ("", False))
    return "", False


def _kind(token: int, by_id: dict[int, str], added: dict[int, dict[str, Any]]) -> TokenType:
    if token not in by_id:
        return TokenType.UNUSED
    if token not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED


def _stops(run: OpenedRun) -> tuple[int, ...]:
    """The stop tokens, the tokenizer's own first."""
    return tuple(sorted(run.stop_ids, key=lambda token: token != run.tokenizer.eos_token_id))
