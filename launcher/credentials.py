"""Masks credentials in all that is printed or written: consoles, reports and run folders are shared. Stdlib only.

A text is never judged by how random it looks: a commit, a digest or base64 in a dataset stays readable. Masked are
- values of environment variables that are named as secrets (HF_TOKEN, WANDB_API_KEY), and what was remembered,
- what is written beside such a name (token=..., "password": "..."), and who logs in within a URL (user:password@),
- tokens that begin as their issuers' do (hf_, sk-, ghp_, AKIA), JSON Web Tokens and private keys.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MASK = "***"
_REMEMBERED: set[str] = set()  # secrets that no variable holds, such as a login file's
LEAST_CHARACTERS = 8  # of a variable's value: masking a shorter one would garble ordinary text
LONGEST = 2_000  # characters of a credential that a cut might halve

WORD = r"secret|passw(?:or)?d|passphrase|credentials?|(?:api|access|account|auth|private|secret|signing)[_-]?key"
ROLES_OF_TOKENS = (
    "bos",
    "eos",
    "pad",
    "unk",
    "sep",
    "cls",
    "mask",
    "end",
    "image",
    "video",
    "audio",
    "per",
    "max",
    "min",
    "sample",
    "stop",
)
TOKEN = "".join(f"(?<!{kind}_)" for kind in ROLES_OF_TOKENS) + "token"
SECRET_NAME = re.compile(rf"(?:{WORD}|{TOKEN}|authorization)$", re.IGNORECASE)
SECRET_VARIABLE = re.compile(
    rf"(?:{WORD}|{TOKEN}|(?:^|_)(?:key|pass|pat|auth)|_pwd)s?(?:_?\d+)?$", re.IGNORECASE
)  # MY_KEY is a secret in the environment; elsewhere a key is any key
USERINFO = re.compile(  # as a path, a URL has one slash only
    r"([a-zA-Z][a-zA-Z0-9+.-]{1,20}:/)(?:(/?)[^\s/@:]{0,200}:(?!\d+/)[^\s@]{1,200}|(/)[^\s/@]{1,200})@"
)
PASSWORD = re.compile(r"://[^\s/@:]{0,200}:([^\s@]{1,200})@")  # in an endpoint's or a proxy's URL
# What stands between a name and its value: an equals sign; a colon, behind `token` only where it is no prose.
NAMED = re.compile(
    rf"""((?:(?:{WORD}|{TOKEN})\\*['"]?\s*=|(?:{WORD})\\*['"]?\s*:|(?:{TOKEN})\\*['"]\s*:|(?<=[{{_.-]){TOKEN}\s*:
    |authorization\\*['"]?\s*[:=](?:\s*\\*['"]?(?:basic|bearer|digest|token)\b)?
    |[?&][\w-]{{0,40}}(?:auth|key|sig|signature)=)\s*\\*['"]?)
    (?:(?<=')[^']+|(?<=")(?:[^"\\]|\\.)+|[^\s,;&'"\\)\]}}]+)""",
    re.IGNORECASE | re.VERBOSE,
)
# Of that a folder's name (.../token=5/...), a special token, and prose (The secret: never give up).
ORDINARY = re.compile(
    r"""(?<![\w?&-])token=\d{1,9}/.*|token\W{1,9}<[^<>\s]*>|(?:(?<=\bthe\ )|(?<=\ba\ )|(?<=\ban\ ))secret:\ [a-z]+""",
    re.IGNORECASE | re.VERBOSE,
)
ISSUED = re.compile(
    r"""(?<![A-Za-z0-9])(?:
    (?:hf|api_org)_(?:oauth_|jwt_)?(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9.]{30,}|[a-z]{30,})
    |sk-(?:(?:admin|ant|live|or|proj|svcacct|test)-[\w-]{8,}|[A-Za-z0-9]{16,})
    |(?:gh[opsur]_|github_pat_|glpat-|npm_|pypi-|wandb_v1_)[\w-]{16,}
    |xox[a-z]-[\w-]{10,}
    |(?:AKIA|ASIA)[A-Z0-9]{16}
    |AIza[\w-]{35}
    |(?<![\w-])eyJ[\w-]{8,4096}\.[\w-]{8,4096}\.[\w-]{0,4096}
    )|(?<=\bBearer\s)[\w.~+/=-]{16,}
    |-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*-----|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def remember(secret: str) -> None:
    """Mask `secret` from now on in this process, as a variable's value is."""
    _REMEMBERED.add(secret.strip())


def masked(text: str) -> str:
    """The text with MASK in place of every credential. Masking twice changes nothing more."""
    return _masker()(text)


def shortened(text: str, limit: int) -> str:
    """The first `limit` characters of a text, masked before it is cut: half a credential might not be known as one."""
    return masked(text[: limit + LONGEST])[:limit]


def masked_tree(value: Any, name: str = "") -> Any:
    """A value with `masked` applied to each string in its dicts, lists, tuples and dataclasses; the same object where
    there is nothing to mask. `name`: the key under which it stands: all of a secret's value is masked."""
    return _tree(value, name, _masker())


def masked_record(record: Any) -> Any:
    """The record with credentials masked. Steps are left as they are: they hold no text, and may be many."""
    steps = getattr(record, "steps", ())
    if not isinstance(steps, tuple) or not steps:
        return masked_tree(record)
    return replace(masked_tree(replace(record, steps=())), steps=steps)


def _tree(value: Any, name: str, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return MASK if value and SECRET_NAME.search(name) else mask(value)
    if isinstance(value, dict):
        below = name if SECRET_NAME.search(name) else ""
        return {
            mask(key) if isinstance(key, str) else key: _tree(v, below or str(key), mask) for key, v in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_tree(item, name, mask) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        before = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        after = {key: _tree(old, key, mask) for key, old in before.items()}
        changes = {key: new for key, new in after.items() if new is not before[key] and new != before[key]}
        return replace(value, **changes) if changes else value
    return value


def _masker() -> Callable[[str], str]:
    known = _alternatives(tuple(sorted(set(_values()))))

    def mask(text: str) -> str:
        if known:
            text = known.sub(MASK, text)
        if "@" in text:
            text = USERINFO.sub(rf"\1\2\3{MASK}@", text)
        if "=" in text or ":" in text:
            text = NAMED.sub(_without_value, text)
        return ISSUED.sub(MASK, text)

    return mask


def _without_value(match: re.Match[str]) -> str:
    return match[0] if ORDINARY.fullmatch(match.string, *match.span()) else f"{match[1]}{MASK}"


def _values() -> Iterator[str]:
    for name, value in os.environ.items():
        parts = PASSWORD.findall(value) if "@" in value else []
        if _names_secret(name) and not (value.startswith(("/", "~")) and os.path.exists(value)):
            parts += [value.strip(), *re.split(r"[,;\n]", value)]  # a file's path is no secret; lists are
        yield from (part for part in parts if len(part) >= LEAST_CHARACTERS)
    yield from (part for part in _REMEMBERED if len(part) >= LEAST_CHARACTERS)


@lru_cache(maxsize=4_096)
def _names_secret(variable: str) -> bool:
    return bool(SECRET_VARIABLE.search(variable))


@lru_cache(maxsize=4)
def _alternatives(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What matches any of these values, as it is and as it is escaped in Python, JSON or a URL."""
    forms = {
        form for v in values for form in (v, repr(v)[1:-1], ascii(v)[1:-1], json.dumps(v)[1:-1], quote(v, safe=""))
    }
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None
