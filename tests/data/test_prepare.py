import numpy as np
import pytest

from launcher.data import example as example_module
from launcher.data import prepare as prepare_module
from launcher.data.pack.micro_batch import micro_batch_of
from launcher.data.prepare import prepare
from launcher.data.read.rows import RowFault
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from launcher.records.counts import closed_turns


def ask(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHATS = [ask(f"Define the word {n}", f"the number {n} " * (1 + n % 5)) for n in range(60)]


def section(*paths, **options):
    return DataSection.model_validate({"sources": [{"path": path} for path in paths], "max_length": 256, **options})


def texts(blocks, tokenizer):
    if blocks is None:
        return []
    return [str(tokenizer.decode(blocks.documents[index].input_ids)) for index in blocks.block_documents]


def ids(prepared):
    return micro_batch_of(prepared.train, range(len(prepared.train))).input_ids.numpy()


def test_rows_become_packed_blocks_with_counts_that_add_up(write, tokenizer):
    bad = [b"{", {"messages": []}, ask("Hi", " "), {"messages": [{"role": "robot", "content": "x"}]}]
    prepared = prepare(section(write([*CHATS, *bad]), bad_rows="skip", validation=0.1), tokenizer, seed=0)
    counts = prepared.counts
    assert (counts["rows_read"], counts["documents"], counts["validation_documents"]) == (64, 54, 6)
    assert (prepared.train_rows, prepared.validation_rows) == (54, 6)
    dropped = {key: n for key, n in counts.items() if "dropped" in key}
    assert dropped == {f"rows_dropped_{r}": 1 for r in ("broken_json", "empty", "zero_supervised", "unknown_role")}
    assert counts["rows_read"] == counts["documents"] + counts["validation_documents"] + sum(dropped.values())
    assert (counts["tokens"], counts["supervised_tokens"]) == (prepared.train.tokens, prepared.train.supervised_tokens)
    assert (counts["truncated"], counts["empty_assistant_turns"]) == (0, 1)
    assert prepared.train.shapes == (256,)
    assert prepared.train.pad_id == tokenizer.pad_token_id


def test_a_fraction_shares_no_row_with_training(write, tokenizer):
    prepared = prepare(section(write(CHATS * 3), validation=0.2), tokenizer, seed=0)
    train, validation = texts(prepared.train, tokenizer), texts(prepared.validation, tokenizer)
    assert not set(train) & set(validation)
    assert (len(train), len(validation)) == (144, 36)
    assert len(set(train) | set(validation)) == 60
    assert prepared.loss_on == {"assistant": prepared.train_rows}


@pytest.mark.parametrize(("number", "copies", "fraction"), [(60, 1, 0.0), (1, 1, 0.5), (1, 5, 0.05)])
def test_a_fraction_that_holds_out_nothing_is_said_unless_it_is_zero(write, tokenizer, number, copies, fraction):
    prepared = prepare(section(write(CHATS[:number] * copies), validation=fraction), tokenizer, seed=0)
    assert (prepared.validation, prepared.examples, prepared.validation_rows) == (None, (), 0)
    assert prepared.train_rows == number * copies
    said = [f"data.validation={fraction} holds out nothing" in note for note in prepared.notes]
    assert said == ([True] if fraction else [])


def test_one_seed_prepares_the_same_and_another_another(write, tokenizer, monkeypatch):
    data = section(write(CHATS), validation=0.2)
    monkeypatch.setattr(prepare_module.cache, "load", lambda identity: None)
    one, same, other = (prepare(data, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(ids(one), ids(same))
    assert one.examples == same.examples
    assert not np.array_equal(ids(one), ids(other))


def test_a_validation_file_is_counted_apart(write, tokenizer):
    path = write([*CHATS[:3], ask("Hi", "")], name="validation.jsonl")
    prepared = prepare(section(write(CHATS[10:]), validation=path), tokenizer, seed=0)
    counts = prepared.counts
    assert (counts["rows_read"], counts["documents"], counts["validation_documents"]) == (50, 50, 3)
    assert (counts["validation_rows_read"], counts["validation_rows_dropped_zero_supervised"]) == (4, 1)
    assert "rows_dropped_zero_supervised" not in counts
    assert len(texts(prepared.validation, tokenizer)) == prepared.validation_rows == 3


def test_sources_of_several_formats_are_trained_on_together_and_counted_by_what_the_loss_sees(write, tokenizer):
    parts = [CHATS, [{"text": "a river"}], [{"prompt": "a", "completion": " river flows"}] * 2]
    paths = [write(part, name=f"{index}.jsonl") for index, part in enumerate(parts)]
    prepared = prepare(section(*paths, validation=0), tokenizer, seed=0)
    assert prepared.counts["rows_read"] == prepared.train_rows == 63
    assert [prepared.counts[f"source_{n}_rows_of_an_epoch"] for n in (1, 2, 3)] == [60, 1, 2]
    assert not any("source" in name for name in prepare(section(paths[0]), tokenizer, seed=0).counts)
    assert "<|bos|>a river<|eot|>" in texts(prepared.train, tokenizer)
    assert prepared.loss_on == {"assistant": 60, "all": 1, "completion": 2}


def test_the_example_asks_a_validation_question_and_knows_its_answer(write, tokenizer):
    example = prepare(section(write(CHATS), validation=0.1), tokenizer, seed=0).examples[0]
    assert example is not None
    assert example.prompt.endswith("<|head|>assistant<|/head|>\n\n")
    assert tokenizer.decode(example.prompt_ids) == example.prompt
    asked = example.prompt.split("Define the word ")[1].split("<|eot|>")[0]
    assert f"the number {asked}" in example.expected


LONG = ask("Define the word sea", "water " * 400)
LONG_QUESTION = ask("why " * 200, "because")


def test_an_example_leaves_room_for_an_answer(write, tokenizer):
    validation = write([LONG_QUESTION, ask("Hi", " "), ask("short", "yes")], name="validation.jsonl")
    prepared = prepare(section(write(CHATS), validation=validation, loss_on="all"), tokenizer, seed=0)
    assert prepared.validation_rows == 3
    assert prepared.examples and prepared.examples[0].expected == "yes"


def test_a_text_of_one_token_teaches_nothing_and_is_dropped(write, make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    tokenizer.bos_token = tokenizer.eos_token = None
    prepared = prepare(section(write([{"text": "a"}, {"text": "a river"}]), validation=0), tokenizer, seed=0)
    assert (prepared.counts["rows_dropped_zero_supervised"], prepared.counts["documents"]) == (1, 1)
    assert prepared.train.supervised_tokens > 0


def test_a_tokenizer_without_padding_pads_with_what_it_has(write, make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = None
    assert prepare(section(write(CHATS)), tokenizer, seed=0).train.pad_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert prepare(section(write(CHATS)), tokenizer, seed=0).train.pad_id == 0


def test_a_second_start_reads_the_same_blocks_from_the_cache(write, tokenizer, monkeypatch):
    path = write([*CHATS, b"{"])
    first = prepare(section(path, bad_rows="skip"), tokenizer, seed=0)
    monkeypatch.setattr(prepare_module, "read_rows", lambda *_, **__: pytest.fail("it was prepared again"))
    second = prepare(section(path, bad_rows="skip", wait_s=5), tokenizer, seed=0)
    assert np.array_equal(ids(first), ids(second))
    assert first.validation is not None and second.validation is not None
    assert first.validation.max_documents == second.validation.max_documents
    for name in ("counts", "examples", "train_rows", "validation_rows", "loss_on", "template", "identity"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.notes == () and "cache" in second.notes[0]


@pytest.mark.parametrize("change", ["row", "seed", "option", "template"])
def test_whatever_decides_the_blocks_makes_them_anew(write, make_tokenizer, change):
    prepare(section(write(CHATS)), make_tokenizer("llama3"), seed=0)
    rows = [*CHATS[:-1], ask("Define the word", "another")] if change == "row" else CHATS
    again = prepare(
        section(write(rows), too_long="drop" if change == "option" else "truncate"),
        make_tokenizer("chatml" if change == "template" else "llama3"),
        seed=int(change == "seed"),
    )
    assert again.notes == ()


def test_a_row_that_is_split_trains_on_all_of_it_and_validates_whole(write, tokenizer):
    path = write([*CHATS[:4], LONG, LONG_QUESTION])
    prepared = prepare(section(path, validation=0, too_long="split"), tokenizer, seed=0)
    whole = prepare(section(path, validation=0, max_length=4096), tokenizer, seed=0)
    counts = prepared.counts
    assert (counts["split"], counts["truncated"], prepared.train_rows) == (2, 0, 6)
    assert counts["pieces_dropped_zero_supervised"] > 0  # the long question, before its answer
    targets = whole.train.supervised_tokens
    assert targets - counts["documents"] <= prepared.train.supervised_tokens < targets  # a piece's first is no target
    fraction = prepare(section(path, validation=0.5, too_long="split"), tokenizer, seed=0)
    train, validation = texts(fraction.train, tokenizer), texts(fraction.validation, tokenizer)
    assert ("water" in "".join(train)) != ("water" in "".join(validation))


def test_sources_are_mixed_by_weight(write, tokenizer):
    many, few = write(CHATS[:50]), write([{"text": f"a river {n}"} for n in range(10)], name="few.jsonl")
    data = section(many, validation=0, sources=[{"path": many, "weight": 1}, {"path": few, "weight": 1}])
    prepared = prepare(data, tokenizer, seed=0)
    trained = texts(prepared.train, tokenizer)
    rivers = [text for text in trained if "a river" in text]
    assert (len(trained), len(rivers), len(set(rivers))) == (60, 30, 10)
    assert {rivers.count(text) for text in rivers} == {3}
    assert (prepared.counts["rows_repeated"], prepared.counts["rows_left_out"]) == (20, 20)
    assert len(set(trained) - set(rivers)) == 30
    assert [prepared.counts[f"source_{n}_rows_of_an_epoch"] for n in (1, 2)] == [30, 30]


def test_rows_of_the_validation_data_are_not_trained_on(write, tokenizer):
    validation = write([*CHATS[:5], ask("only", "here")], name="validation.jsonl")
    prepared = prepare(section(write(CHATS), validation=validation), tokenizer, seed=0)
    assert (prepared.train_rows, prepared.validation_rows) == (55, 6)
    assert prepared.counts["rows_dropped_in_validation"] == 5
    assert not set(texts(prepared.train, tokenizer)) & set(texts(prepared.validation, tokenizer))
    with pytest.raises(DataError, match="0 usable rows.*\nFound: 60 rows read; 60 rows dropped: in validation"):
        prepare(section(write(CHATS), validation=write(CHATS, name="same.jsonl")), tokenizer, seed=0)


def test_validation_data_may_be_an_entry_like_a_source(write, tokenizer):
    both = [{"text": "a river", "prompt": "a", "completion": " river flows"}]
    entry = {"path": write(both, name="validation.jsonl"), "format": "text"}
    prepared = prepare(section(write(CHATS), validation=entry), tokenizer, seed=0)
    assert texts(prepared.validation, tokenizer) == ["<|bos|>a river<|eot|>"]


def test_a_weighted_source_that_would_only_validate_is_refused(write, tokenizer, monkeypatch):
    paths = write(CHATS[:9], name="many.jsonl"), write(CHATS[9:10], name="few.jsonl")
    data = section(*paths, sources=[{"path": path, "weight": 1} for path in paths], validation=0.1)
    monkeypatch.setattr(prepare_module, "held_out", lambda digests, *, fraction: np.arange(len(digests)) == 9)
    with pytest.raises(DataError, match=rf"{paths[1]}: a source with a weight .*\nFound: data.validation=0.1"):
        prepare(data, tokenizer, seed=0)


def test_texts_are_not_read_again_for_an_example(write, tokenizer, monkeypatch):
    monkeypatch.setattr(example_module, "read_rows", lambda *_, **__: map(pytest.fail, ["read again"]))
    prepared = prepare(section(write([{"text": f"river {n}"} for n in range(20)]), validation=0.3), tokenizer, seed=0)
    assert not prepared.examples and prepared.validation_rows == 6


def test_an_error_in_validation_data_says_so_and_one_in_training_data_does_not(write, tokenizer):
    good, bad = write(CHATS[:1] * 20), write([CHATS[0], {"messages": "Hi"}], name="bad.jsonl")
    empty, csv = write([{"text": " "}], name="empty.jsonl"), write([b"a;b,c"], name="bad.csv")
    for path, expected in (
        (bad, f"{bad}:2: "),
        (empty, f"{empty}: 0 usable rows"),
        (csv, f"{csv}: the header tells"),
        ("./none.jsonl", "./none.jsonl: a source is"),
    ):
        for validation, sources, prefix in ((path, good, "data.validation: "), (0, path, "")):
            with pytest.raises(DataError) as caught:
                prepare(section(sources, validation=validation), tokenizer, seed=0)
            assert str(caught.value).startswith(prefix + expected) and caught.value.code == 3
    with pytest.raises(RowFault):
        prepare(section(good, validation=bad), tokenizer, seed=0)


def test_rows_of_the_validation_data_are_known_by_their_words(write, tokenizer):
    rows = [ask(f" {row['messages'][0]['content']}\n", row["messages"][1]["content"] + "\n ") for row in CHATS[:5]]
    prepared = prepare(section(write(CHATS), validation=write(rows, name="validation.jsonl")), tokenizer, seed=0)
    assert (prepared.train_rows, prepared.counts["rows_dropped_in_validation"]) == (55, 5)


DROPS_THOUGHTS = (  # and ends no turn
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>' + m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_template_leaves_out_and_answers_without_an_end_are_counted_and_said(
    write, make_tokenizer, streaming, tokenizer
):
    rows = [*CHATS, *(ask(f"Sum of 2 and {n}?", f"<think>2 + {n}</think>{2 + n}") for n in range(3))]
    rows = [{"messages": row["messages"] * 2} for row in rows]  # the last answer of each ends with the eos_token
    options = {"validation": 0, "streaming": streaming, "max_length": 64}
    prepared = prepare(section(write(rows), **options), make_tokenizer(DROPS_THOUGHTS), seed=0)
    passes = prepared.counts["rows_read"] // 63
    assert prepared.counts["rows_cut_by_template"] == pytest.approx(3 * passes, abs=3)
    assert prepared.counts["rows_without_end_token"] == prepared.counts["rows_read"]
    [cut] = [note for note in prepared.notes if "leaves out text" in note]
    [endless] = [note for note in prepared.notes if "does not end with" in note]
    assert f"of {prepared.counts['rows_cut_by_template']:,} of {prepared.counts['rows_read']:,} rows" in cut
    assert f"in {prepared.counts['rows_read']:,} of" in endless
    fine = prepare(section(write(rows), **options), tokenizer, seed=0)
    assert not {"rows_cut_by_template", "rows_without_end_token"} & fine.counts.keys()
    assert not any("template" in note or "end token" in note for note in fine.notes)


def test_a_source_of_thoughts_that_the_template_drops_says_so(write, make_tokenizer):
    rows = [ask("Sum?", "<think>Five.</think>")] * 2
    template = DROPS_THOUGHTS.replace("[-1] }}", "[-1] + '<|eot|>' }}")
    with pytest.raises(DataError, match="2 rows cut by template.*2 rows dropped: nothing to learn"):
        prepare(section(write(rows), validation=0), make_tokenizer(template), seed=0)


def test_an_answer_that_is_cut_off_before_its_end_is_not_counted_as_ended(write, tokenizer):
    rows = [ask(f"Sum of 2 and {n}?", "word " * 200) for n in range(5)]
    rows += [{"messages": [*ask("Sum?", "Five.")["messages"], *ask("Why?", "word " * 200)["messages"]]}]
    counts = prepare(section(write(rows), validation=0, max_length=64), tokenizer, seed=0).counts
    assert counts["truncated"] == 6
    assert sum(closed_turns(counts).values()) == 1, "the first answer of the last row"
    counts = prepare(section(write(rows), validation=0, max_length=64, too_long="split"), tokenizer, seed=0).counts
    assert sum(closed_turns(counts).values()) == 7
