"""The Modelfile of a GGUF file for Ollama: a Go template in place of the Jinja one, and the stop tokens.

The chat template is rendered with marks for contents. Where each message looks alike wherever it stands, what is
around the marks is the Go template; it must render the chats of the proof as Jinja does. Tools, thinking, and whatever
depends on the place of a message are not in it.
"""

from typing import Any

from launcher.export.proof import CHATS, SAID, rendered

MARK = "\x02"  # in place of a content
LONG_CHAT = ["user", "assistant"] * 3 + ["user"]  # where a template changes after some messages
Parts = dict[str, tuple[str, str]]  # what stands before and after a content, by role


def modelfile(tokenizer: Any, file: str, stops: tuple[str, ...], *, adds_bos: bool) -> tuple[str, str]:
    """Its text, and what of the chat template it expresses, in words."""
    quoted = (f'"""{stop}"""' if '"' in stop else f'"{stop}"' for stop in stops)  # Ollama has no escapes
    lines, template = [f"FROM ./{file}", *(f"PARAMETER stop {stop}" for stop in quoted)], "{{ .Prompt }}"
    told = "the prompt as it is: the tokenizer has no chat template"
    if tokenizer.chat_template:
        found = _parts(tokenizer)
        if found is None:
            told = "no TEMPLATE: the chat template is more than text around messages; Ollama may know one of its own"
            return "\n".join([*lines, f"# {told}", ""]), told
        start, parts, prompt = found
        kept = " (spaces around a message are kept, which the chat template drops)" if _trims(tokenizer) else ""
        told = f"messages of {', '.join(parts)}, without tools{kept}"
        template = _go(start.removeprefix(tokenizer.bos_token or "") if adds_bos else start, parts, prompt)
    return "\n".join([*lines, f'TEMPLATE """{template}"""', ""]), told


def _go(start: str, parts: Parts, prompt: str) -> str:
    cases = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in parts.items()
    )
    return f"{start}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{prompt}"


def _parts(tokenizer: Any) -> tuple[str, Parts, str] | None:
    """What stands before the first message, what around each by role, and what invites an answer. None where the
    template is more than that."""
    pieces = _pieces(tokenizer, ["user", "assistant", "user"])
    if len(pieces) != 4:
        return None
    start = tokenizer.bos_token or ""
    start = start if pieces[0].startswith(start) else ""
    user = (pieces[0].removeprefix(start), pieces[3])
    parts = {
        "user": user,
        "assistant": (pieces[1].removeprefix(user[1]), pieces[2].removesuffix(user[0])),
    }
    if len(system := _pieces(tokenizer, ["system", "user"])) == 3:
        parts["system"] = (system[0].removeprefix(start), system[1].removesuffix(user[0]))
    prompt = _pieces(tokenizer, ["user"], prompt=True)[-1].removeprefix(user[1])
    for roles in (*CHATS, LONG_CHAT):
        for asked in (True, False):
            text, ids = rendered(tokenizer, roles, prompt=asked)
            made = start + "".join(SAID[role].join(parts[role]) for role in roles if role in parts)
            if ids and text != made + (prompt if asked else ""):  # no ids: refused by the template
                return None
    unsafe = any(mark in text for text in (start, prompt, *sum(parts.values(), ())) for mark in ("{{", '"""'))
    return None if unsafe else (start, parts, prompt)


def _pieces(tokenizer: Any, roles: list[str], *, prompt: bool = False) -> list[str]:
    """The text between contents; empty where the template refuses."""
    text, ids = rendered(tokenizer, roles, prompt=prompt, said=dict.fromkeys(SAID, MARK))
    return text.split(MARK) if ids else []


def _trims(tokenizer: Any) -> bool:
    return f" {MARK} " not in rendered(tokenizer, ["user"], prompt=False, said={"user": f" {MARK} "})[0]
