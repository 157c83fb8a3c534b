"""WordNet 3.0 → the pretraining corpus and the instruction set of `tiny`. Standard library only, deterministic.

    python recipes/tiny/extract.py [--wordnet /usr/share/wordnet]

It needs the database files of the Debian package wordnet-base 1:3.0-37 (data.noun, data.verb, data.adj, data.adv).
Written beside this script:

    build/corpus.txt.gz   one document per line: every synset that is not held out, in prose, and some chats
    build/heldout.txt     the held-out validation synsets in the same prose, to measure the language model on
    train.jsonl, validation.jsonl   `messages` rows made from the held-out synsets

A held-out synset leaves no trace in the corpus. It is a leaf, so no other synset names it as its kind; any other
relation that points to it is dropped, and so is any synset whose text repeats a held-out gloss. `check_separation`
checks the finished text.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from wordnet import Key, Synset, chat, document, read_wordnet

HERE = Path(__file__).parent
SEED = 3_0_37
RENDERINGS = 4  # documents per synset, each in other words
CHAT_SHARE = 0.08  # chats per document; they show the base what turns are, and never ask for a definition
TRAIN_ROWS, VALIDATION_ROWS, VERB_SHARE = 4000, 256, 0.12
GLOSS_WORDS = range(4, 17)  # words in the gloss of an instruction row: one line of a dictionary


def candidates(synsets: dict[Key, Synset]) -> list[Synset]:
    """Leaf nouns and verbs in plain letters whose kind is known: a reader could define them from their kind."""
    plain = re.compile(r"[a-z][a-z '-]*[a-z]")
    return [
        s
        for s in synsets.values()
        if s.key[0] in "nv"
        and not s.relations.keys() & {"~", "~i", "@i"}
        and any(k in synsets and plain.fullmatch(synsets[k].words[0]) for k in s.relations.get("@", [])[:1])
        and plain.fullmatch(s.words[0])
        and s.gloss.isascii()
        and "(" not in s.gloss
        and len(s.gloss.split()) in GLOSS_WORDS
    ]


def hold_out(synsets: dict[Key, Synset], choose: random.Random) -> tuple[list[Synset], list[Synset]]:
    """Train and validation synsets; no headword and no gloss occurs twice in the two together."""
    pool = candidates(synsets)
    choose.shuffle(pool)
    total = TRAIN_ROWS + VALIDATION_ROWS
    wanted = {"v": round(total * VERB_SHARE), "n": total - round(total * VERB_SHARE)}
    seen: set[str] = set()
    chosen: list[Synset] = []
    for s in pool:
        if wanted[s.key[0]] and s.gloss not in seen and not seen & set(s.words):
            wanted[s.key[0]] -= 1
            seen |= {s.gloss, *s.words}
            chosen.append(s)
    choose.shuffle(chosen)
    return chosen[VALIDATION_ROWS:], chosen[:VALIDATION_ROWS]


def row(synset: Synset, synsets: dict[Key, Synset]) -> dict[str, list[dict[str, str]]]:
    """One `messages` row: the question names the headword and its kind, the answer is a dictionary entry."""
    part, manner = ("noun", "a kind of") if synset.key[0] == "n" else ("verb", "a way to")
    word, kind = synset.words[0], synsets[synset.relations["@"][0]].words[0]
    return {
        "messages": [
            {"role": "user", "content": f'Define the {part} "{word}", {manner} {kind}.'},
            {"role": "assistant", "content": f"{word} ({part}, {synset.field}): {synset.gloss}"},
        ]
    }


def echoes(text: str, glosses: dict[tuple[str, ...], list[tuple[str, ...]]]) -> bool:
    """Whether the text contains one of the glosses, ignoring punctuation and case. `glosses` comes from by_opening."""
    words = words_of(text)
    openings = zip(words, words[1:], words[2:], words[3:], strict=False)
    return any(words[i : i + len(g)] == g for i, o in enumerate(openings) for g in glosses.get(o, ()))


def by_opening(synsets: list[Synset]) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Glosses as words, indexed by their first four, so that one pass over a text finds them all."""
    index: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for words in (words_of(s.gloss) for s in synsets):
        index[words[:4]].append(words)
    return dict(index)


def words_of(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def check_separation(documents: list[str], train: list[Synset], validation: list[Synset]) -> None:
    """Raise ValueError if the corpus contains a held-out gloss, or train and validation share a headword or gloss."""
    glosses = by_opening(train + validation)
    leaked = [d for d in documents if echoes(d, glosses)]
    shared = {w for s in train for w in (*s.words, s.gloss)} & {w for s in validation for w in (*s.words, s.gloss)}
    if leaked or shared:
        raise ValueError(f"held-out glosses in the corpus: {leaked[:3]}; in both splits: {sorted(shared)[:3]}")


def write_rows(path: Path, rows: Iterable[dict[str, list[dict[str, str]]]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    synsets = read_wordnet(parser.parse_args().wordnet)
    choose = random.Random(SEED)
    train, validation = hold_out(synsets, choose)
    held_out, glosses = {s.key for s in train + validation}, by_opening(train + validation)
    free = [s for s in synsets.values() if s.key not in held_out]
    usable = {s.key: s for s in free if not any(echoes(text, glosses) for text in (s.gloss, *s.examples, *s.words))}
    documents = [document(s, usable, choose) for _ in range(RENDERINGS) for s in usable.values()]
    in_chats = choose.choices(list(usable.values()), k=int(CHAT_SHARE * len(documents)))
    documents += filter(None, (chat(s, usable, choose) for s in in_chats))
    choose.shuffle(documents)
    check_separation(documents, train, validation)
    corpus = "".join(d + "\n" for d in documents)

    build = HERE / "build"
    build.mkdir(exist_ok=True)
    (build / "corpus.txt.gz").write_bytes(gzip.compress(corpus.encode(), mtime=0))
    (build / "heldout.txt").write_text("".join(document(s, usable, choose) + "\n" for s in validation), "utf-8")
    write_rows(HERE / "train.jsonl", (row(s, synsets) for s in train))
    write_rows(HERE / "validation.jsonl", (row(s, synsets) for s in validation))
    print(f"{len(synsets)} synsets, {len(held_out)} held out, {len(free) - len(usable)} repeat a held-out gloss")
    print(f"corpus: {len(documents)} documents, {len(corpus)} characters")
    print(f"corpus SHA-256 {hashlib.sha256(corpus.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
