"""Columns mapped by the user, and Jinja lines over columns."""

import json

import pytest

from launcher.data.prepare import prepare
from launcher.data.read.rows import Conversation, Message, PlainText
from launcher.errors import DataError, RecipeError
from launcher.preflight.before_torch import check_data
from launcher.recipe.data_section import DataSection, Source
from tests.support.reading import opened, read, refusal

QA = {"question": "Where?", "answer": "There.", "id": 7}


def texts(path, **keys):
    rows, _ = read(path, **keys)
    return [row.text for row in rows if isinstance(row, PlainText)]


def recipe_refusal(path, **keys):
    with pytest.raises(RecipeError) as caught:
        opened(path, **keys)
    return str(caught.value)


def test_mapped_columns_are_read_as_ours_and_the_others_stay_what_they_are(write):
    rows, counts = read(write([QA, QA]), columns={"prompt": "question", "completion": "answer"})
    assert [(row.text, row.answer) for row in rows] == [("Where?There.", 6)] * 2
    assert counts == {"rows_read": 2, "unused_key_id": 2}


def test_columns_can_change_names(write):
    [row], _ = read(
        write([{"prompt": "b", "completion": "a"}]), columns={"prompt": "completion", "completion": "prompt"}
    )
    assert row.text == "ab"


def test_a_column_that_gives_way_is_counted_as_unused(write):
    [row], counts = read(write([{"text": "old", "body": "a river"}]), columns={"text": "body"})
    assert (row.text, counts["unused_key_text (not mapped)"]) == ("a river", 1)


@pytest.mark.parametrize(
    ("columns", "turn"),
    [
        ({"messages": "dialogue", "role": "speaker", "content": "words"}, ("user", "assistant")),
        ({"conversations": "dialogue", "from": "speaker", "value": "words"}, ("human", "gpt")),
    ],
)
def test_keys_of_messages_are_mapped_in_chats(write, columns, turn):
    dialogue = [{"speaker": role, "words": text, "at": 1} for role, text in zip(turn, ("Hi", "Hello"), strict=True)]
    rows, counts = read(write([{"dialogue": dialogue}]), columns=columns)
    assert [row.messages for row in rows if isinstance(row, Conversation)] == [
        (Message("user", "Hi"), Message("assistant", "Hello"))
    ]
    assert counts["rows_read"] == 1 and any(key.endswith(".at") for key in counts)


def test_optional_columns_may_be_missing_in_some_rows(write):
    row = {"instruction": "Name it", "output": "a river"}
    rows, _ = read(write([row, {**row, "context": "Blue."}]), columns={"input": "context"})
    assert [row.messages[0].content for row in rows] == ["Name it", "Name it\n\nBlue."]


def test_a_missing_column_is_named_with_those_there_are_and_the_nearest(write):
    message = refusal(write([QA]), columns={"prompt": "qestion", "completion": "answer"})
    assert '"prompt" is called "qestion" here' in message and "question, answer, id" in message
    assert 'Did you mean "question"?' in message
    rows, counts = read(
        write([QA, {"answer": "x"}]), columns={"prompt": "question", "completion": "answer"}, bad_rows="skip"
    )
    assert len(rows) == 1 and counts["rows_dropped_missing_column"] == 1


def test_an_optional_column_or_key_that_no_row_has_is_refused_at_the_end(write):
    row = {"instruction": "Name it", "output": "a river", "context": "Blue."}
    message = refusal(write([row]), columns={"input": "contxt"}, bad_rows="skip")
    assert "in all rows" in message and 'Did you mean "context"?' in message
    chat = {"messages": [{"speaker": "user", "content": "Hi"}, {"speaker": "assistant", "content": "Hello"}]}
    message = refusal(write([chat]), columns={"role": "speeker"}, bad_rows="skip")
    assert 'Did you mean "speaker"?' in message and "speaker, content" in message


def test_a_file_of_a_folder_may_lack_an_optional_column_that_another_has(write, tmp_path):
    row = {"instruction": "Name it", "output": "a river"}
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write([{**row, "context": "Blue."} if name == "b.jsonl" else row], name=name)
    for streaming in (False, True):
        rows, _ = read(tmp_path, columns={"input": "context"}, streaming=streaming)
        assert [len(row.messages[0].content) for row in rows] == [7, 14, 7]
    feeds = opened(tmp_path, columns={"input": "context"}).feeds
    assert [len(list(feed.raw_rows())) for feed in (*feeds, *feeds)] == [1] * 6
    message = refusal(tmp_path, columns={"input": "contxt"})
    assert message.startswith(f"{tmp_path}, in all rows: ") and "bad_rows" not in message


def test_a_name_that_is_none_of_ours_is_refused_before_anything_is_read(tmp_path):
    message = recipe_refusal(tmp_path / "no.jsonl", columns={"promt": "question"})
    assert 'did you mean "prompt"?' in message and "completion" in message


def test_the_columns_of_a_folder_hold_for_all_its_files_and_for_validation(write, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write([{"body": name}], name=name)
    assert texts(tmp_path, columns={"text": "body"}) == ["a.jsonl", "b.jsonl"]
    data = DataSection.model_validate({"validation": {"path": str(tmp_path), "columns": {"text": "body"}}})
    assert isinstance(data.validation_source, Source) and data.validation_source.columns == {"text": "body"}


def test_the_columns_of_a_validation_entry_are_its_own(write, tokenizer):
    held = write([{"body": "a lake"}, {"body": "a sea"}], name="held.jsonl")
    sources = [
        {
            "path": write([QA, {"question": "a ", "answer": "lake"}]),
            "columns": {"prompt": "question", "completion": "answer"},
        }
    ]
    for validation in ({"columns": {"text": "body"}}, {"template": "{{ body }}"}):
        data = DataSection.model_validate(
            {"sources": sources, "validation": {"path": held, **validation}, "max_length": 64}
        )
        prepared = prepare(data, tokenizer, seed=0)
        assert (prepared.validation_rows, prepared.counts["rows_dropped_in_validation"]) == (2, 1)
        assert "data: nothing uses id (1 row)" in prepared.notes
    data = data.model_copy(update={"validation": Source(path=held, columns={"text": "bdy"})})
    with pytest.raises(DataError, match='data.validation: .*"text" is called "bdy" here'):
        prepare(data, tokenizer, seed=0)


def test_wrong_columns_and_templates_end_a_run_before_torch_is_loaded(write):
    for entry in ({"columns": {"promt": "question"}}, {"template": "{{ q "}, {"delimiter": ";"}):
        with pytest.raises(RecipeError):
            check_data(Source.model_validate({"path": write([QA]), **entry}))


def test_a_template_makes_a_text_of_the_columns_and_keeps_its_last_line_end(write):
    rows, counts = read(write([QA]), template="Q: {{question}} A: {{ answer }}\n")
    assert (rows[0].text, counts["unused_key_id"]) == ("Q: Where? A: There.\n", 1)
    assert texts(write([QA]), template="{% if id > 3 %}{{ question | upper }}{% endif %}") == ["WHERE?"]


def test_a_template_with_a_completion_makes_both(write):
    [row], _ = read(write([QA]), template="Q: {{question}}\nA:", completion=" {{answer}}")
    assert (row.text, row.answer) == ("Q: Where?\nA: There.", 12)


def test_columns_gives_a_template_names_for_columns_that_jinja_cannot_write(write):
    path = write([{"The question": "Where?"}])
    assert texts(path, template="Q: {{ q }}", columns={"q": "The question"}) == ["Q: Where?"]
    assert 'did you mean "q' in recipe_refusal(path, template="{{ question }}", columns={"qestion": "The question"})


def test_a_column_called_text_gives_way_to_the_template(write):
    path = write([{"text": "old", "title": "new"}])
    rows, counts = read(path, template="{{ title }}")
    assert (rows[0].text, counts["unused_key_text (not mapped)"]) == ("new", 1)
    assert texts(path, template="{{ title }}: {{ text }}") == ["new: old"]


def test_a_column_that_a_template_lacks_makes_the_row_faulty_by_name(write):
    path = write([QA, {"question": "Who?"}])
    message = refusal(path, template="{{ qestion }}")
    assert 'no "qestion"' in message and 'Did you mean "question"?' in message
    rows, counts = read(path, template="{{ question }}{{ answer }}", bad_rows="skip")
    assert len(rows) == 1 and counts["rows_dropped_missing_column"] == 1


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_a_value_that_is_no_text_is_not_printed_as_python_shows_it(write, value):
    message = refusal(write([{"q": value}]), template="Q: {{ q }}")
    assert "no text" in message and ":1: the template" in message


@pytest.mark.parametrize(
    "attack",
    [
        "{{ q.__class__ }}",
        "{{ ''.__class__.__mro__ }}{{ q }}",
        "{{ q.__init__.__globals__ }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}{{ q }}",
        "{{ q | attr('__class__') }}",
        "{% for i in range(10**9) %}{{ q }}{% endfor %}",
        "{{ 'x' * 10**9 }}{{ q }}",
        "{{ 9 ** 9 ** 9 ** 9 }}{{ q }}",
        "{{ '%1000000000d' % 1 }}{{ q }}",
        "{{ '{:1000000000}'.format(1) }}{{ q }}",
        "{{ q.ljust(10 ** 9) }}",
        "{{ [q] | tojson(indent=30000000) }}",
        "{{ [q] | tojson(30000000) }}",
        "{{ [[q] | tojson, ''] | map('tojson', indent=30000000) | join }}",
        "{{ q | replace('', q) }}",
        "{{ q.replace('', q) }}",
        "{{ (q | tojson).replace('', q) }}",
        "{{ [q] | map('replace', '', q) | join }}",
        "{% set f = q.replace %}{{ f('', q) }}",
        "{{ lipsum }}{{ q }}",
        "{{ q.append }}{{ q }}",
        "{% include '/etc/passwd' %}{{ q }}",
        "{% set x = cycler(q) %}{{ q }}",
    ],
)
def test_a_template_reaches_nothing_but_the_row_and_pads_and_multiplies_nothing(write, attack):
    message = refusal(write([{"q": "a river"}]), template=attack)
    assert ":1: the template of a source makes a text" in message
    rows, counts = read(write([{"q": "a river"}]), template=attack, bad_rows="skip")
    assert not rows and counts.total() == 2


def test_a_template_can_replace_and_write_json(write):
    line = "{{ q.replace('a', 'b') }} {{ q | replace('r', '') }} {{ [q] | tojson }}"
    assert texts(write([{"q": "a river"}]), template=line) == ['b river a ive ["a river"]']


def test_a_template_that_gives_more_than_a_row_may_have_is_stopped(write):
    line = "{% for a in q %}{% for b in q %}{{ q }}{% endfor %}{% endfor %}"
    assert "data.max_row_mib" in refusal(write([{"q": "x" * 2000}]), template=line, max_row_mib=0.01)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"template": "{{ q "}, "valid Jinja"),
        ({"template": "Q:"}, "has none"),
        ({"template": "{{ q | center }}"}, "center"),
        ({"template": "{{ q | random }}"}, "random"),
        ({"template": "{{ q }}", "completion": "end"}, "completion of a source must use"),
    ],
)
def test_a_template_that_no_row_can_fill_is_refused_before_anything_is_read(tmp_path, keys, words):
    message = recipe_refusal(tmp_path / "no.jsonl", **keys)
    assert words in message and "source" in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"completion": "{{ a }}"}, "needs template"),
        ({"template": "{{ a }}", "format": "messages"}, "makes rows of the format text"),
        ({"template": "{{ a }}", "completion": "{{ b }}", "format": "text"}, "prompt_completion"),
    ],
)
def test_keys_of_a_source_that_contradict_one_another_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        Source.model_validate({"path": "x.jsonl", **keys})


def test_two_entries_for_one_file_keep_their_own_columns(write):
    path = write([QA])
    entries = [{"path": path, "columns": {"text": name}} for name in ("question", "answer")]
    feeds = [
        feed for entry in entries for feed in opened(path, **{k: v for k, v in entry.items() if k != "path"}).feeds
    ]
    assert len({feed.source for feed in feeds}) == 2
    assert [json.dumps(raw.fields["text"]) for feed in feeds for raw in feed.raw_rows()] == ['"Where?"', '"There."']
