"""The token that stops generation closes every supervised turn, or the turn is counted, or the data refused."""

import json
import re

import pytest

from launcher.data.chat.encode import Encoder
from launcher.data.prepare import prepare
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from launcher.records.counts import ends_in_words
from tests.support.chats import chat, supervised_runs

TURNS = ("user: Hi", "assistant: Hello", "user: More", "assistant: Bye")
BARE = (  # turns end by the next one's opening, behind a newline
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = ["<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE, NEXT_TURN, EOS = (f"turns_closed_by_{rule}_" for rule in ("template", "next_turn", "eos"))


@pytest.fixture
def bare(build_tokenizer):
    def build(template=BARE, eos="<eos>"):
        return build_tokenizer({"extra_special_tokens": TOKENS} | ({"eos_token": eos} if eos else {}), template)

    return build


def ends_of(tokenizer, *turns, stops=(), **options):
    """The supervised runs of one chat, and the counts of its answers' ends."""
    stop_ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    encoder = Encoder(tokenizer, data=DataSection.model_validate(options), stop_ids=stop_ids)
    [(_, document)] = encoder.encode([chat(*turns)])
    assert ("rows_without_end_token" in document.remarks) is ("turns_without_end_token" in document.ends)
    return supervised_runs(tokenizer, document), document.ends


def test_the_next_turns_opening_ends_a_turn_if_the_model_stops_there_and_is_appended_to_the_chat(bare):
    runs, ends = ends_of(bare(), *TURNS, stops=["<|user|>"])
    assert runs == ["Hello\n<|user|>", "Bye\n<|user|>"]
    assert ends == (NEXT_TURN + "<|user|>", EOS + "<|user|>")
    [whole], _ = ends_of(bare(), *TURNS, stops=["<|user|>"], loss_on="all")
    assert whole.endswith("Bye\n<|user|>")


def test_an_opening_at_which_the_model_does_not_stop_ends_no_turn(bare):
    runs, ends = ends_of(bare(), *TURNS)
    assert runs == ["Hello\n", "Bye\n<eos>"]
    assert ends == ("turns_without_end_token", EOS + "<eos>")


def test_a_stop_token_that_the_next_message_spells_out_ends_no_turn(bare):
    no_openings = bare(BARE.replace("'<|' + m.role + '|>' +", ""))
    runs, _ = ends_of(no_openings, "user: a", "assistant: b", "user: <|user|>", stops=["<|user|>"])
    assert not any("<|user|>" in run for run in runs)


def test_a_chat_that_a_question_ends_gets_no_eos(bare):
    tokenizer = bare()
    assert ends_of(tokenizer, *TURNS[:3]) == (["Hello\n"], ("turns_without_end_token",))
    assert ends_of(tokenizer, *TURNS[:3], "assistant:  ")[0] == ["Hello\n"]


def test_a_chat_that_is_learned_as_a_whole_ends_with_a_stop_token_where_an_answer_ends_it(bare):
    [whole], _ = ends_of(bare(), *TURNS, loss_on="all")
    assert whole.endswith("<|assistant|>Bye\n<eos>")
    [asked], _ = ends_of(bare(), *TURNS[:3], loss_on="all")
    assert asked.endswith("<|user|>More\n")
    [closed], _ = ends_of(bare(BARE.replace("'\n'", "eos_token")), *TURNS, loss_on="all")
    assert closed.endswith("Bye<eos>") and closed.count("Bye<eos><eos>") == 0


def test_marks_that_leave_the_end_token_out_are_extended_by_it(bare):
    said = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    marked = BARE.replace("+ m.content + '\n' }}", "}}" + said + "{% endif %}{{ eos_token }}")
    runs, ends = ends_of(bare(marked), *TURNS)
    assert runs == ["Hello<eos>", "Bye<eos>"] and ends[1] == NEXT_TURN + "<eos>"


def test_the_token_that_ends_a_chat_is_a_stop_token_also_where_the_model_does_not_name_it(bare):
    runs, ends = ends_of(bare(BARE.replace("'\n'", "'<|system|>'")), *TURNS)
    assert runs == ["Hello<|system|>", "Bye<|system|>"] and ends == (TEMPLATE + "<|system|>",) * 2


def test_what_a_template_writes_behind_the_models_stop_token_is_not_learned(bare):
    prompts_always = BARE.replace("'\n'", "eos_token + '\n'").replace("{% if add_generation_prompt %}", "{% if true %}")
    runs, ends = ends_of(bare(prompts_always.replace("<|assistant|>{%", "<|system|>{%")), *TURNS[:2], loss_on="all")
    assert runs[0].endswith("Hello<eos>\n<|system|>") and ends == ()
    several = BARE.replace("'\n'", "'<|system|>' + eos_token + '\n<|user|><|system|>'")
    runs, ends = ends_of(bare(several), *TURNS)
    assert runs == ["Hello<|system|><eos>", "Bye<|system|><eos>"] and ends == (TEMPLATE + "<eos>",) * 2


@pytest.fixture
def prepared(tmp_path):
    def prepared(tokenizer, *chats, **options):
        rows = [{"messages": [{"role": r, "content": c} for r, c in (t.split(": ") for t in turns)]} for turns in chats]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        section = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "validation": 0, "max_length": 64, **options}
        return prepare(DataSection.model_validate(section), tokenizer, seed=0)

    return prepared


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_which_no_answer_ends_with_a_stop_token_is_refused_with_the_remedy(bare, prepared, streaming):
    for tokenizer, turns in ((bare(eos=None), TURNS), (bare(), TURNS[:3])):
        with pytest.raises(DataError) as caught:
            prepared(tokenizer, turns, turns, streaming=streaming)
        assert caught.value.code == 3
        rule, found, remedy = str(caught.value).splitlines()
        assert "stops generation" in rule and "answers does; the template is the tokenizer's own" in found
        assert ("no eos_token" in found) is (tokenizer.eos_token is None) and "eos_token" in remedy


LONG = ("user: Hi", "assistant: Hello " + "again and " * 60)
PAIR = {"prompt": "a", "completion": " river" * 90}


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_which_every_answer_is_cut_before_its_end_is_refused_with_the_length_it_needs(
    bare, prepared, streaming
):
    with pytest.raises(DataError) as caught:
        prepared(bare(), LONG, LONG, streaming=streaming)
    assert caught.value.code == 3
    rule, found, remedy = str(caught.value).splitlines()
    assert "stops generation" in rule and re.search(
        r"data.max_length=64 cuts ([\d,]+) of \1 answers before their end", found
    )
    needed = int(re.search(r"Raise data.max_length \(the longest row has (\d+) tokens\)", remedy)[1])
    assert "data.too_long=split" in remedy
    data = prepared(bare(), LONG, LONG, max_length=needed, streaming=streaming)
    assert data.counts[EOS + "<eos>"] >= 2 and "turns_cut_before_end" not in data.counts


def test_completions_that_end_do_not_excuse_chats_of_which_no_answer_does(bare, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": " river"}))
    messages = [{"role": role, "content": content} for role, content in (turn.split(": ") for turn in TURNS[:3])]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}))
    section = {"sources": [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")], "validation": 0}
    with pytest.raises(DataError, match="none of 1 answers does"):
        prepare(DataSection.model_validate(section), bare(), seed=0)


def test_cut_answers_beside_ones_that_no_token_ends_are_named_with_both_remedies(bare, prepared):
    with pytest.raises(DataError) as caught:
        prepared(bare(), (*TURNS[:2], "user: More", LONG[1]))
    _, found, remedy = str(caught.value).splitlines()
    assert "data.max_length=64 cuts 1 of 2 answers before their end, and none of 1 answers does" in found
    assert re.match(r"Raise data.max_length \(the longest row has \d+ tokens\)\. .*eos_token", remedy)


def test_a_cut_at_the_very_end_of_an_answer_leaves_it_whole(bare, prepared):
    """Only the line end behind the end token is cut."""
    tokenizer = bare(BARE.replace("'\n'", "eos_token + '\n\n'"))
    [(_, document)] = Encoder(tokenizer, data=DataSection()).encode([chat(*LONG)])
    end = int(document.supervised.nonzero()[0][-1]) + 1
    counts = prepared(tokenizer, LONG, max_length=end).counts
    assert (counts["truncated"], counts[TEMPLATE + "<eos>"]) == (1, 1) and "turns_cut_before_end" not in counts
    with pytest.raises(DataError, match="cuts 1 of 1 answers"):
        prepared(tokenizer, LONG, max_length=end - 1)


def test_one_answer_that_ends_is_enough_and_the_cut_ones_are_counted_and_said(bare, prepared):
    data = prepared(bare(), LONG, TURNS[:2], LONG)
    assert data.counts["turns_cut_before_end"] == 2 and data.counts[EOS + "<eos>"] == 1
    assert "2 are cut off before their end" in ends_in_words(data.counts)


@pytest.mark.parametrize("eos", ["<eos>", None])
def test_completions_that_are_all_cut_are_refused_too_and_texts_never(bare, tmp_path, eos):
    def prepared(row, **options):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        section = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "validation": 0, "max_length": 64, **options}
        return prepare(DataSection.model_validate(section), bare(eos=eos), seed=0)

    if eos:
        with pytest.raises(DataError, match="cuts 1 of 1 answers"):
            prepared(PAIR)
        assert prepared(PAIR, max_length=2048).counts["turns_closed_by_completion_<eos>"] == 1
    else:
        prepared(PAIR)  # it would have no end anyway
    prepared(PAIR, loss_on="all")
    prepared({"text": "a river " * 99})


def test_data_of_which_some_answers_end_with_a_stop_token_is_counted_and_said(bare, prepared):
    data = prepared(bare(), TURNS, TURNS[:3])
    assert data.counts[EOS + "<eos>"] == 1 and data.counts["turns_without_end_token"] == 2
    assert data.counts["rows_without_end_token"] == 2
    assert any(
        "2 of 2 rows" in note and "does not end with a token that stops generation" in note for note in data.notes
    )


def test_texts_and_completions_are_ended_as_ever_and_never_refused_for_it(bare, tmp_path):
    for row in ({"text": "a river"}, {"prompt": "a", "completion": " river"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        section = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "validation": 0}
        data = prepare(DataSection.model_validate(section), bare(eos=None), seed=0)
        assert not any(key.startswith("turns_") for key in data.counts)
