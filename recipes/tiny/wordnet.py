"""Read WordNet's data files as synsets, and write a synset as plain sentences. Standard library only.

The format of the files is in wndb(5WN), the pointer symbols are in wninput(5WN): @ kind, ~ kinds, @i and ~i of
instances, #p and %p part, ! opposite, & similar, + derived.
"""

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
MAX_LISTED = 6  # relations named in one sentence
# lexnames(5WN): the lexicographer file a synset comes from; adjectives and adverbs have no field worth a label.
FIELDS = (
    *("", "", "", "top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event"),
    *("feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession"),
    *("process", "quantity", "relation", "shape", "state", "substance", "time", "body", "change", "cognition"),
    *("communication", "competition", "consumption", "contact", "creation", "emotion", "motion", "perception"),
    *("possession", "social", "stative", "weather", ""),
)
Key = tuple[str, str]  # part of speech (n, v, a, r) and offset in its data file


@dataclass(frozen=True)
class Synset:
    """One set of synonyms: `relations` maps a pointer symbol of wninput(5WN) to the synsets it points to."""

    key: Key
    field: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    relations: dict[str, list[Key]]


def split_gloss(text: str) -> tuple[str, tuple[str, ...]]:
    """The definition, and the quoted examples that follow it."""
    definition, *rest = re.split(r';?\s*"', text.strip(), maxsplit=1)
    examples = re.findall(r'"([^"]+)"', '"' + rest[0]) if rest else []
    return definition.strip().rstrip(";:, "), tuple(e.strip().rstrip(";,. ") for e in examples)


def parse_line(line: str) -> Synset:
    """The synset on one line of a data file (format: wndb(5WN))."""
    head, _, gloss = line.partition(" | ")
    offset, file_number, part, count, *rest = head.split()
    n_words = int(count, 16)
    words = tuple(re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in rest[: 2 * n_words : 2])
    pointers = rest[2 * n_words + 1 : 2 * n_words + 1 + 4 * int(rest[2 * n_words])]
    relations: dict[str, list[Key]] = defaultdict(list)
    for symbol, target, target_part in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=True):
        relations[symbol].append((target_part, target))
    definition, examples = split_gloss(gloss)
    key = ("a" if part == "s" else part, offset)  # a satellite adjective lives in data.adj too
    return Synset(key, FIELDS[int(file_number)], words, definition, examples, dict(relations))


def read_wordnet(folder: Path) -> dict[Key, Synset]:
    """All synsets of the four data files, in file order. Each file starts with the licence, indented by two spaces."""
    lines = (line for part in PARTS for line in (folder / f"data.{part}").read_text("utf-8").splitlines())
    synsets = (parse_line(line) for line in lines if not line.startswith("  "))
    return {s.key: s for s in synsets if s.gloss}


def listed(names: list[str]) -> str:
    """The names, each once, as "a, b and c"."""
    words = list(dict.fromkeys(names))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def with_article(word: str, gloss: str) -> str:
    """The noun, with an article where it takes one, which is where its gloss begins with an article or "any"."""
    counts = word.islower() and re.match(r"(an?|any|someone|one) ", gloss)
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}" if counts else word


def opening(synset: Synset, word: str, kind: str, choose: random.Random) -> str:
    """The sentence that gives the definition."""
    gloss, part = synset.gloss, synset.key[0]
    plain = [f"{word}: {gloss}", f"{word} means {gloss}", f"the meaning of {word} is {gloss}"]
    plain += [f"{gloss}: this is {word}"]
    named = with_article(word, gloss)
    if part == "n":
        plain += [f"{named} is {gloss}", f"the word {word} is a noun, and it means {gloss}"]
    if part == "n" and kind:
        plain += [f"{named} is a kind of {kind}: {gloss}", f"{named}, a kind of {kind}, is {gloss}"] * 3
    if part == "v":
        plain += [f"to {word} is to {gloss}", f"the word {word} is a verb, and it means to {gloss}"]
    if part == "v" and kind:
        plain += [f"to {word} is a way to {kind}: {gloss}", f"to {word}, a way to {kind}, is to {gloss}"] * 3
    if part == "a":
        plain += [f"something that is {word} is {gloss}"]
    return choose.choice(plain)


def related(synset: Synset, word: str, names: dict[str, list[str]]) -> list[str]:
    """One sentence for each relation in `names` (pointer symbol → words)."""
    named = with_article(word, synset.gloss)
    verb = synset.key[0] == "v"
    sentences = {
        "=": "{w} is also called {x}" if not verb else "to {w} is also to {x}",
        "~": "kinds of {w} are {x}" if not verb else "ways to {w} are to {x}",
        "~i": "{w} has examples such as {x}",
        "@i": "{w} is one {x}",
        "#p": "{n} is a part of {x}",
        "%p": "the parts of {n} are {x}",
        "#m": "{n} is a member of {x}",
        "%m": "the members of {w} are {x}",
        "#s": "{w} is found in {x}",
        "%s": "{w} is made of {x}",
        "!": "the opposite of {w} is {x}",
        "&": "{w} is similar to {x}",
        "+": "{w} is related to {x}",
        ";c": "{w} is a word of {x}",
        "*": "to {w} is also to {x}",
        ">": "to {w} may make something {x}",
    }
    return [s.format(w=word, n=named, x=listed(names[k])) for k, s in sentences.items() if k in names]


def names_of(synset: Synset, word: str, synsets: dict[Key, Synset], choose: random.Random) -> dict[str, list[str]]:
    """A few words for each relation, by pointer symbol ("=": synonyms); only of synsets that are in `synsets`."""
    relations = {symbol: [k for k in keys if k in synsets] for symbol, keys in synset.relations.items()}
    names = {
        symbol: [choose.choice(synsets[k].words) for k in choose.sample(keys, min(MAX_LISTED, len(keys)))]
        for symbol, keys in relations.items()
        if keys
    }
    synonyms = [w for w in synset.words if w != word][:MAX_LISTED]
    return names | ({"=": synonyms} if synonyms else {})


def document(synset: Synset, synsets: dict[Key, Synset], choose: random.Random) -> str:
    """One synset as one line of prose: its definition, then a random part of its examples and relations."""
    word = choose.choice(synset.words)
    names = names_of(synset, word, synsets, choose)
    extra = related(synset, word, names) + [f"for example, {e}" for e in synset.examples]
    if synset.field:
        part = "noun" if synset.key[0] == "n" else "verb"
        extra.append(f"the word {word} is a {part} in the field of {synset.field}")
    choose.shuffle(extra)
    sentences = [opening(synset, word, next(iter(names.get("@", [])), ""), choose), *extra[: choose.randint(0, 3)]]
    if choose.random() < 0.15:
        choose.shuffle(sentences)
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences)


def chat(synset: Synset, synsets: dict[Key, Synset], choose: random.Random) -> str:
    """A question about a relation and its answer, rendered as by the chat template; "" if there is no relation."""
    word = choose.choice(synset.words)
    names = names_of(synset, word, synsets, choose)
    verb = synset.key[0] == "v"
    questions = {
        "=": 'What is another word for "{w}"?',
        "@": 'What is the verb "{w}" a way to do?' if verb else 'What is the noun "{w}" a kind of?',
        "~": "Name ways to {w}." if verb else "Name kinds of {w}.",
        "!": 'What is the opposite of "{w}"?',
        "&": 'Name a word that is similar to "{w}".',
        "#p": 'What is the noun "{w}" a part of?',
    }
    possible = [(q, names[k]) for k, q in questions.items() if k in names]
    if not possible:
        return ""
    question, answer = choose.choice(possible)
    return f"<|user|>{question.format(w=word)}<|end|><|assistant|>{listed(answer)}"
