"""The documents say what is there: links, paths, recipe keys and quoted messages are compared with the tree."""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.recipe.fields import LEAVES, SECTIONS
from launcher.recipe.load import resolve
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
HISTORY = "docs/benchmarks.md"  # a log: it may name what is gone
README_LINES = 100  # one screen and links


def broken_links(page: Path, text: str) -> list[str]:
    """Local links of a page that lead nowhere, or to a heading that is not there."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    return [link for link in links if not leads(page, text, *link.partition("#")[::2])]


def leads(page: Path, text: str, file: str, heading: str) -> bool:
    target = page.parent / file if file else page
    if not heading or target.suffix != ".md":
        return target.exists()
    shown = text if not file else target.read_text(encoding="utf-8") if target.exists() else ""
    titles = re.findall(r"^#+ (.+)$", shown, flags=re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_paths(text: str) -> list[str]:
    """Paths of the repository that a text names and that are not there."""
    named = re.findall(r"(?<![\w/.])((?:launcher|recipes|tests|docs|accelerate_configs)/[\w./-]*\w/?)", text)
    return sorted({path for path in named if not (ROOT / path).exists()})


def unknown_keys(text: str) -> list[str]:
    """Recipe keys in code spans or commands that the schema lacks."""
    keys = re.findall(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?=[=\s`\],)]|$)", text, re.MULTILINE)
    known = {*LEAVES, "model.device"}  # the latter is PyTorch's, in docs/adapter.md
    return sorted({key for key in keys if key not in known and not key.endswith((".py", ".json", ".md", ".lock"))})


def messages(package: Path) -> Iterator[str]:
    """Every string literal of the package; what an f-string fills in is a zero byte."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted_messages(text: str) -> list[str]:
    """The first column of the tables of messages."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def unsaid(quotes: list[str], said: list[str]) -> list[str]:
    """Quotes that no literal contains; `…` stands for anything."""
    parts = {quote: [part.strip() for part in quote.split("…") if part.strip()] for quote in quotes}
    return [quote for quote in quotes if not any(all(part in text for part in parts[quote]) for text in said)]


def claims(package: Path) -> Iterator[str]:
    """The claim of every Verdict that the package makes; what an f-string fills in is `…`."""
    for path in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assigned = {
            target.id: node.value
            for node in nodes
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Verdict":
                claim = node.args[0]
                value = assigned[claim.id] if isinstance(claim, ast.Name) else claim
                parts = value.values if isinstance(value, ast.JoinedStr) else [value]
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_paths_and_keys_of_a_page_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert broken_links(ROOT / name, text) == []
    if name != HISTORY:
        assert missing_paths(text) == []
        assert unknown_keys(text) == []


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    quotes = quoted_messages((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quotes) > 20
    assert unsaid(quotes, list(messages(ROOT / "launcher"))) == []


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_recipe_for_own_data_is_one_and_its_rows_are_chats(tmp_path: Path) -> None:
    page = ROOT / "docs" / "own-data.md"
    [recipe], [rows] = blocks_of(page, "yaml"), blocks_of(page, "json")
    (tmp_path / "my.yaml").write_text(recipe)
    resolved = resolve([f"recipe={tmp_path / 'my.yaml'}"]).recipe
    assert resolved.data.sources[0].path == str(tmp_path / "my-chats.jsonl") and resolved.train.epochs == 3
    explained = re.findall(r"`([a-z]+\.[a-z_]+)`", page.read_text(encoding="utf-8"))
    assert {f"{name}.{key}" for name, section in yaml.safe_load(recipe).items() for key in section} <= {*explained}
    roles = [[message["role"] for message in json.loads(row)["messages"]] for row in rows.splitlines()]
    assert roles == [["user", "assistant"]] * 2


def test_python_on_a_page_parses_and_imports_what_exists() -> None:
    code = [ast.parse(block) for page in PAGES for block in blocks_of(page, "python")]
    imports = [node for tree in code for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert len(code) >= 4 and len(imports) >= 5
    for node in imports:
        assert all(hasattr(importlib.import_module(node.module or ""), alias.name) for alias in node.names)


def test_every_claim_has_a_row_and_every_test_that_a_row_names_exists() -> None:
    text, made = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8"), set(claims(ROOT / "launcher"))
    assert {"every step ran compiled", "saved adapter reloads", "… against fp32 is eager's"} <= made
    assert unsaid(sorted(made), quoted_messages(text)) == []
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 40 and [name for name in named if f"def {name}(" not in tests] == []


def test_the_readme_is_one_screen_and_every_page_is_linked_from_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert [page for page in PAGE_NAMES if page.startswith("docs/") and f"({page})" not in text] == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text("## Its words, all")
    links = "[b](b.md) [c](https://x.org) [d](#words) [e](c.md#its-words-all) [f](c.md#words)\n# Words"
    assert broken_links(tmp_path / "a.md", links) == ["b.md", "c.md#words"]
    assert missing_paths("`launcher/nowhere.py` and launcher/cli.py") == ["launcher/nowhere.py"]
    assert unknown_keys("`train.lerning_rate=1` and `train.lr=1`") == ["train.lerning_rate"]
    assert unsaid(["the disk is … full", "no such … message"], ["the disk is \0 full"]) == ["no such … message"]
