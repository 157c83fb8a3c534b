"""What is filled in is what the template writes, for every chat that a skeleton answers for."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from launcher.data.chat import skeletons as module
from launcher.data.chat.named_templates import CONTROL, put_template
from launcher.data.chat.render import Renderer
from launcher.data.chat.skeletons import Skeletons
from tests.data.conftest import CHATML, LLAMA3, MANY_TURNS, STOCK, MakeTokenizer, chat

Chat = list[dict[str, str]]
TEMPLATES = [*((family, origin) for family in sorted(CONTROL) for origin in ("shipped", "stock"))]
each_template = pytest.mark.parametrize(("family", "origin"), TEMPLATES)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def messages(*contents: str, first: str = "user") -> Chat:
    """User and assistant in turn, after a system message if `first` says so."""
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def written(tokenizer: PreTrainedTokenizerFast, chat: Chat, *, prompt: bool = False) -> str | None:
    """None where the template refuses."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except Exception:
        return None


def of(tokenizer: PreTrainedTokenizerFast) -> Skeletons:
    return Skeletons(tokenizer.get_chat_template(), tokenizer.special_tokens_map)


def learned(tokenizer: PreTrainedTokenizerFast, *chats: Chat, prompt: bool = False) -> Skeletons:
    skeletons = of(tokenizer)
    for one in chats:
        if (text := written(tokenizer, one, prompt=prompt)) is not None:
            skeletons.learn(one, text, prompt=prompt)
    return skeletons


@pytest.fixture
def make(make_family: Any) -> Any:
    def tokenizer_of(family: str, origin: str) -> PreTrainedTokenizerFast:
        tokenizer = make_family(family, template=STOCK[family] if origin == "stock" else None)
        if origin == "shipped":
            put_template(tokenizer, family)
        return tokenizer  # type: ignore[no-any-return]

    return tokenizer_of


@each_template
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("first", ["user", "system"])
def test_one_chat_teaches_all_others_of_its_roles(
    make: Any, family: str, origin: str, prompt: bool, first: str
) -> None:
    tokenizer = make(family, origin)
    one, other = messages(*"abcde", first=first), messages(" x\n", "%s {y} ", "<z>", "é\n\n", "漢 ", first=first)
    skeletons = learned(tokenizer, one, prompt=prompt)
    assert skeletons.text(other, prompt=prompt) == written(tokenizer, other, prompt=prompt) is not None
    assert skeletons.text(other, prompt=not prompt) is None
    assert skeletons.text(messages(*"abcd", first=first), prompt=prompt) is None


odd = ["", " \n", "\n\nx\n", "</think>", "<think>\nhm\n</think>\n\nso", "a</think>b</think>c", "%s", "{{ x }}", "</s>"]
contents = st.lists(st.sampled_from(odd) | st.text(max_size=20), min_size=3, max_size=3)


@each_template
@quick
@given(one=contents, two=contents, other=contents)
@example(one=["a", "b", "c"], two=["a", "<think>b</think>c", "d"], other=["a", "x</think>\ny", "d"])
def test_what_is_filled_in_is_what_the_template_writes(
    make: Any, family: str, origin: str, one: list[str], two: list[str], other: list[str]
) -> None:
    tokenizer = make(family, origin)
    skeletons = learned(tokenizer, messages(*one), messages(*two))
    for contents in (one, two, other):
        assert skeletons.text(messages(*contents), prompt=False) in (None, written(tokenizer, messages(*contents)))


def test_a_template_that_asks_for_thoughts_has_a_skeleton_for_each_answer(make: Any) -> None:
    tokenizer = make("qwen3", "stock")
    plain, thinking = messages("a", "b"), messages("a", "<think>\nb\n</think>\n\nc")
    skeletons = learned(tokenizer, plain)
    other = messages("q", "<think>long</think>short")
    assert skeletons.text(other, prompt=False) is None
    skeletons.learn(thinking, str(written(tokenizer, thinking)), prompt=False)
    assert skeletons.text(other, prompt=False) == written(tokenizer, other)
    assert skeletons.text(plain, prompt=False) == written(tokenizer, plain)


DEEDS = {  # what a template may do with the content c, and whether a skeleton knows what comes of it
    "{{ c }}": True,
    "{% if c != none and 'a' in c %}A{% endif %}{{ c }}": True,
    "{% if c not in [none, ''] and c.startswith('a') %}A{% endif %}{{ c }}": True,
    "{% if c != false %}{{ c }}{% endif %}": True,
    "{% autoescape true %}{{ c }}{% endautoescape %}": False,
    "{{ 'abc'[c] is defined }}": False,
    "{{ '%' + c + '{}' }}": True,
    "{{ c | trim }}": True,
    "{{ c.strip('ab') + c.lstrip() + c.rstrip('\n') }}": True,
    "{{ c.removeprefix('a').removesuffix('b') }}": True,
    "{{ c.replace('a', 'b') }}": True,
    "{{ c.split('a')[-1].strip() }}": True,
    "{{ (c.split('a') | first) + (c.split('a') | last) }}": True,
    "{% if c %}{{ c }}{% else %}none{% endif %}": True,
    "{% if c is string %}{{ c }}{% else %}{{ c[0] }}{% endif %}": True,
    "{% if 'a' in c or c.startswith('b') or c == 'cc' %}{{ c }}{% endif %}": True,
    "{% if c.endswith(('a', 'b')) %}{{ c }}{% endif %}": False,
    "{% if c is none or c is mapping or c is number or c is undefined %}x{% endif %}{{ c }}": True,
    "{% set d %}<{{ c }}>{% endset %}{{ d }}": True,
    "{% set d %}{{ c }}{% endset %}{{ d | trim }}": True,
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(c) }}": True,
    "{% generation %}{{ c + 'x' }}{% endgeneration %}": True,
    "{% set ns = namespace(x='') %}{% set ns.x = c %}{{ ns.x }}": True,
    "{{ (c + 'x') | trim }}": False,
    "{{ c ~ 'x' }}": False,
    "{{ c | length }}": False,
    "{{ c | upper }}": False,
    "{{ c.upper() }}": False,
    "{{ c[0] }}": False,
    "{{ c[1:] }}": False,
    "{{ c['x'] is defined }}": False,
    "{{ c | tojson }}": False,
    "{{ messages | tojson }}": False,
    "{{ messages }}": False,
    "{{ '%s' | format(c) }}": False,
    "{{ '%s' % c }}": False,
    "{{ '{}'.format(c) }}": False,
    "{{ c | int + 1 }}": False,
    "{{ c | float }}": False,
    "{{ c * 2 }}": False,
    "{{ c in 'abc' }}": False,
    "{{ 'abc'.startswith(c) }}": False,
    "{{ {'a': 1}[c] is defined }}": False,
    "{{ c in {'a': 1} }}": False,
    "{{ c in ['a', 'b'] }}": True,
    "{{ c < 'b' }}": False,
    "{{ c == messages[0]['role'] + 'x' }}": True,
    "{{ c == messages[1]['content'] }}": False,
    "{{ messages[0] == messages[1] }}{{ c }}": True,
    "{% for x in c %}{{ x }}.{% endfor %}": False,
    "{{ c is iterable }}": False,
    "{{ c is sequence }}": False,
    "{{ c is lower }}": False,
    "{{ c is sameas 'a' }}": False,
    "{{ messages | map(attribute='content') | join('+') }}": False,
    "{{ (messages | map(attribute='content') | list)[0] }}": True,
    "{{ (messages | selectattr('content', 'equalto', 'a') | list) | length }}": True,
    "{{ (messages | map(attribute='content') | unique | list) | length }}": False,
    "{{ (messages | map(attribute='content') | map('int') | list)[0] }}": False,
    "{{ c | default('x') }}": True,
    "{{ c | default('x', true) }}": True,
    "{{ c.nothing is defined }}": False,
    "{{ c.isdigit() }}": False,
    "{% if c.strip() == '' %}void{% endif %}{{ c }}": True,
    "{{ c | e }}": False,
    "{{ c | safe }}": False,
    "{{ (c, 1) | string }}": False,
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ c }}": True,
    "{{ lipsum() | length > 0 }}": False,
    "{{ range(3) | list | tojson }}{{ c }}": False,
}
SAID = ["a", "b", "", " ", "ab", "bab", "cc", " a \n", "5", "é%s{}", "user", "userx", "A"]


@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_a_template_does_with_a_content_is_filled_in_exactly_or_not_at_all(
    make_tokenizer: MakeTokenizer, deed: str
) -> None:
    tokenizer = make_tokenizer("{% set c = messages[0]['content'] %}" + deed)
    for said in SAID:
        skeletons = learned(tokenizer, messages(said, "x"))
        knows = skeletons.text(messages(said, "x"), prompt=False) is not None
        assert knows == (DEEDS[deed] and written(tokenizer, messages(said, "x")) is not None)
        for other in SAID:
            asked = messages(other, "x")
            assert skeletons.text(asked, prompt=False) in (None, written(tokenizer, asked))


def test_a_skeleton_that_a_later_chat_proves_wrong_is_forgotten_with_all_others(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{{ messages[0]['content'] }}")
    skeletons = learned(tokenizer, messages("a", "x"))
    assert skeletons.text(messages("b", "x"), prompt=False) == "b"
    skeletons.learn(messages("b", "x"), "another", prompt=False)
    assert skeletons.text(messages("b", "x"), prompt=False) is None


def test_what_a_template_refuses_is_not_learned(make_tokenizer: MakeTokenizer) -> None:
    refused = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    skeletons = of(make_tokenizer("chatml"))
    skeletons.learn(refused, "anything", prompt=False)
    assert skeletons.text(refused, prompt=False) is None


def test_nothing_is_filled_in_once_transformers_writes_something_else(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("llama3")
    skeletons = learned(tokenizer, messages("a", "b"))
    assert skeletons.text(messages("c", "d"), prompt=False)
    skeletons.learn(messages("a"), "another text", prompt=False)
    for asked in (messages("c", "d"), messages("a")):
        assert skeletons.text(asked, prompt=False) is None
        skeletons.learn(asked, str(written(tokenizer, asked)), prompt=False)
        assert skeletons.text(asked, prompt=False) is None


def test_tries_are_bounded_for_a_shape_and_for_all(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(
        "{% if messages[0]['content'] == 'a' %}A{% else %}{{ messages[0]['content'] | length }}{% endif %}"
    )
    skeletons = learned(tokenizer, *[messages("b" * n) for n in range(1, 5)], messages("a"))
    assert skeletons.text(messages("a"), prompt=False) is None  # four chats in vain
    assert learned(tokenizer, messages("b"), messages("a")).text(messages("a"), prompt=False) == "A"
    monkeypatch.setattr(module, "MOST", 2)
    llama = make_tokenizer("llama3")
    skeletons = learned(llama, *[messages(*"abcd"[:n]) for n in (1, 2, 3)])
    assert [skeletons.text(messages(*"wxyz"[:n]), prompt=False) is None for n in (1, 2, 3)] == [False, False, True]


def test_chats_are_rendered_alike_the_first_time_and_filled_in(make_tokenizer: MakeTokenizer) -> None:
    rows = [MANY_TURNS, chat("user: a <|eot|> b", "assistant: <|im_end|> c"), chat("user: Hi", "assistant: ")]
    for template in (LLAMA3, CHATML):
        renderer = Renderer(make_tokenizer(template), name="it")
        first, again = (renderer.render(rows, ["assistant"] * len(rows)) for _ in range(2))
        assert (
            first
            == again
            == [Renderer(make_tokenizer(template), name="it").render([r], ["assistant"])[0] for r in rows]
        )


def test_filling_in_runs_no_template(make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("llama3")
    renderer = Renderer(tokenizer, name="it")
    rows = [chat("user: a", "assistant: b"), chat("user: c", "assistant: d")]
    [expected] = Renderer(tokenizer, name="it").render(rows[1:], ["assistant"])
    renderer.render(rows[:1], ["assistant"])

    def never(*_: Any, **__: Any) -> Sequence[str]:
        raise AssertionError

    monkeypatch.setattr(tokenizer, "apply_chat_template", never)
    assert renderer.render(rows[1:], ["assistant"]) == [expected]
