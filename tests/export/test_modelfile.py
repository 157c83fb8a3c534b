"""The Modelfile: a Go template where the Jinja one is text around messages, and honest where it is more."""

import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.export.modelfile import modelfile
from launcher.export.proof import CHATS, SAID, rendered
from tests.conftest import ROOT, TINY

SHIPPED = ROOT / "launcher" / "data" / "chat" / "templates"


def tokenizer_with(template: str | None) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.chat_template = template
    return tokenizer


def go_rendered(text: str, roles: list[str]) -> str:
    """What the Go template of a Modelfile makes of a chat: text, a range over messages, and a case for each role."""
    template = re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)
    assert template is not None
    parts = re.fullmatch(r"(.*)\{\{ range .Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template[1], re.DOTALL)
    assert parts is not None
    start, cases, prompt = parts.groups()
    found = re.findall(r'if eq .Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', cases, re.DOTALL)
    by_role = dict(found)
    return start + "".join(by_role[role].replace("{{ .Content }}", SAID[role]) for role in roles) + prompt


def test_the_tiny_template_renders_as_jinja_does_but_for_the_bos_that_llama_cpp_adds() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    text, told = modelfile(tokenizer, "m.gguf", ("<|end|>",), adds_bos=True)
    assert text.startswith('FROM ./m.gguf\nPARAMETER stop "<|end|>"\n') and "user, assistant, system" in told
    with_bos, _ = modelfile(tokenizer, "m.gguf", (), adds_bos=False)
    for roles in CHATS:
        expected = rendered(tokenizer, roles, prompt=True)[0]
        assert "<|begin|>" + go_rendered(text, roles) == expected == go_rendered(with_bos, roles)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "mistral", "gemma"])
def test_a_shipped_template_is_rendered_alike_or_said_not_to_be_in_it(name: str) -> None:
    template = (SHIPPED / f"{name}.jinja").read_text()
    tokenizer = tokenizer_with(template.replace("<|begin_of_text|>", "<|begin|>"))
    text, told = modelfile(tokenizer, "m.gguf", (), adds_bos=False)
    assert ("TEMPLATE" in text.replace("no TEMPLATE", "")) == (name in ("chatml", "llama3")), told
    if "no TEMPLATE" in told:
        assert f"# {told}" in text
        return
    for roles in CHATS:
        assert go_rendered(text, roles) == rendered(tokenizer, roles, prompt=True)[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if loop.last %}<|end|>{% endif %}{% endfor %}",
        "{% for m in messages %}{{ '<|end|>' if loop.index0 > 4 }}{{ m.content }}|{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ '{{' + m.role + m.content }}{% endfor %}",
    ],
)
def test_what_depends_on_the_place_or_changes_a_message_gets_no_template(template: str) -> None:
    assert "no TEMPLATE" in modelfile(tokenizer_with(template), "m.gguf", (), adds_bos=False)[1]


def test_a_stop_token_with_quotes_is_read_as_it_is() -> None:
    """Ollama takes off the outer quotes and knows no escapes."""
    text, _ = modelfile(tokenizer_with(None), "m.gguf", ('"', 'say "so"', "<|end|>"), adds_bos=True)
    stops = [line.removeprefix("PARAMETER stop ") for line in text.splitlines() if line.startswith("PARAMETER stop ")]
    read = [stop[3:-3] if stop.startswith('"""') else stop[1:-1] for stop in stops]
    assert read == ['"', 'say "so"', "<|end|>"]


def test_without_a_chat_template_the_prompt_is_passed_as_it_is() -> None:
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(tokenizer_with(None), "m.gguf", (), adds_bos=True)[0]


def test_dropped_spaces_are_told() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}"
    assert "spaces around a message are kept" in modelfile(tokenizer_with(template), "m", (), adds_bos=False)[1]
