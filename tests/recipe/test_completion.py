"""completion=bash and completion=zsh: what the shells themselves offer."""

import json
import os
import pty
import re
import shutil
import subprocess
import time

import pytest

from launcher.errors import RecipeError
from launcher.recipe.completion import SHELLS, completion_script
from launcher.recipe.fields import LEAVES

BREAKS = " \t\n\"'@><=;|&(:"  # bash's own


def offered(line, folder, *, breaks=BREAKS):
    """What bash would put in place of the last word of `line`, as readline splits it: the text after the last break."""
    words = re.findall(rf"[{re.escape(breaks.strip())}]+|[^\s{re.escape(breaks.strip())}]+", line)
    words += [""] if line.endswith(" ") else []
    program = f"""
compopt() {{ :; }}
{completion_script("bash")}
COMP_WORDBREAKS=$BREAKS COMP_LINE=$LINE COMP_POINT=${{#LINE}} COMP_WORDS=({" ".join(f"'{w}'" for w in words)})
COMP_CWORD={len(words) - 1}
_qlora_launcher
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "LINE": line, "BREAKS": breaks},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "my data").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qlora-launcher rec", ["recipe="]),
        ("qlora-launcher train.accu", ["train.accumulation="]),
        ("qlora-launcher recipe=tin", ["tiny"]),
        ("qlora-launcher recipe=tiny mode=pre", ["preview"]),
        ("qlora-launcher recipe=tiny compile.mode=", ["strict", "warn", "off"]),
        ("qlora-launcher recipe=tiny data.sources=./my.", ["./my.jsonl"]),
        ("qlora-launcher recipe=tiny data.sources=./my", ["./my.jsonl", "./my data"]),
        ("qlora-launcher mode=generate max", ["max_tokens="]),
        ("qlora-launcher mode=export format=", ["merged", "adapter", "gguf"]),
        ("qlora-launcher recipe=new format=alp", ["alpaca"]),
        ("qlora-launcher recipe=copy from=llama1b-", ["llama1b-t4"]),
        ("qlora-launcher recipe=tiny train.lr=", [""]),
        ("qlora-launcher recipe=tiny nonsense=", [""]),
        ("qlora-launcher --ver", ["--version"]),
    ],
)
def test_bash_completes_keys_choices_recipes_and_files(line, words, folder):
    assert sorted(offered(line, folder)) == sorted(words)


def test_every_key_is_offered_and_an_empty_word_offers_no_file(folder):
    words = offered("qlora-launcher ", folder)
    assert {f"{leaf}=" for leaf in LEAVES} <= set(words) and "my.jsonl" not in words
    assert "my.jsonl" in offered("qlora-launcher recipe=", folder)


def test_bash_completes_where_the_equals_sign_or_the_colon_breaks_no_word_and_after_a_colon(folder):
    assert offered("qlora-launcher recipe=tin", folder, breaks=" \t\n") == ["recipe=tiny"]
    (folder / "a:b.jsonl").touch()
    assert offered("qlora-launcher data.sources=./a:", folder) == ["b.jsonl"]
    assert offered("qlora-launcher data.sources=./a:", folder, breaks=" \t\n=") == ["./a:b.jsonl"]


def test_a_terminal_shows_what_tab_completes(folder):
    (folder / "script").write_text(completion_script("bash"))
    parent, child = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=child, stdout=child, stderr=child, cwd=folder, close_fds=True,
        env={**os.environ, "PS1": "> ", "TERM": "dumb", "INPUTRC": "/dev/null"}, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    program = "qlora-launcher() { printf '<%s>' \"$@\"; }; source ./script\n"
    os.write(parent, (program + "qlora-launcher rec\tti\t mode=prev\t data.sources=./my\\ \t\n").encode())
    shown = b""
    deadline = time.monotonic() + 8
    while b"<recipe=" not in shown and time.monotonic() < deadline:
        shown += os.read(parent, 4096)
    shell.kill()
    shell.wait()
    os.close(parent)
    text = shown.decode()
    assert "<recipe=tiny><mode=preview>" in text, text


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_holds_nothing_that_a_shell_would_expand_and_is_no_longer_than_it_must_be(shell):
    script = completion_script(shell)
    words = re.findall(r'echo "(.*)" ;;', script)
    assert len(words) > 40 and all(re.fullmatch(r"[\w. =/-]+", line) for line in words)
    assert "@" not in script.replace("[@]", "").replace("=:@", "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_reads_the_script():
    program = completion_script("zsh").replace("compdef _q", ": _q") + '\n_qlora_launcher_words "mode" "x"'
    done = subprocess.run(["zsh", "-fc", program], capture_output=True, text=True)
    assert done.returncode == 0 and "preview" in done.stdout, json.dumps(done.stderr)


def test_another_shell_is_refused():
    with pytest.raises(RecipeError, match="one of bash, zsh; got 'fish'; try completion=bash"):
        completion_script("fish")
