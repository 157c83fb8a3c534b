"""Every wrong command line and recipe is refused with rule, value and remedy, all at once, and nothing in it runs."""

import shlex

import pytest

from launcher.recipe.load import resolve

# --- the form of arguments


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("tiny", "did you mean recipe=tiny"),
        ("--verbose", "key=value"),
        ("--recipe", "write recipe=..."),
        ("--versoin", "did you mean --version?"),
        ("=3", "key=value"),
        ("mode=paint", "train, check, parity, bench, preview, generate, export, push, evaluate, report, compare"),
        ("mode=", "train, check, parity, bench, preview, generate, export, push, evaluate, report, compare"),
        ("train.lr=[1", "not valid YAML"),
        ("train.lr=!!python/name:os.system", "tag"),
        ("lora.targets=[&x,*x]", "alias"),
        ("report=", "a path"),
        ("blocks=3", "mode=train; remove"),
        ("mode=show blocks=1", "mode=show; remove"),
        ("mode=preview report=r.json", "report=r.json"),
        ("train.lr=1e-3 train.lr=1e-4", "twice"),
        ('train={"lr":1e-3} train.lr=1e-4', "twice"),
        ("mode=show mode=train", "twice"),
        ("mode=preview blocks=1 blocks=1", "twice"),
        ("recipe=tiny", "twice"),
    ],
)
def test_a_malformed_argument_is_refused(refusal, argument, expected):
    message = refusal("recipe=tiny", *argument.split(" "))
    assert expected in message and argument.split(" ")[-1].split("=")[0] in message


@pytest.mark.parametrize("blocks", ["", "-1", "two", "1.5", "²", "9" * 5000])
def test_only_a_whole_number_of_blocks_is_taken(refusal, blocks):
    message = refusal("recipe=tiny", "mode=preview", f"blocks={blocks}")
    assert "a whole number >= 0" in message and "try blocks=2" in message and len(message) < 200


# --- unknown keys


@pytest.mark.parametrize("key", ["train.save_steps", "save_total_limit", "data.bad_words", "lora.from"])
def test_a_key_with_another_word_is_no_misspelling(refusal, key):
    message = refusal("recipe=tiny", f"{key}=5")
    assert f"unknown key {key}" in message and "did you mean" not in message and " has " in message


def test_a_key_like_no_other_lists_the_keys_there_are(refusal):
    assert all(section in refusal("recipe=tiny", "zzzzqqq=1") for section in ("model", "train", "run"))
    assert "train has steps, epochs" in refusal("recipe=tiny", "train.zzzz=1")
    assert "data.sources[0] has path, format" in refusal("recipe=tiny", "data.sources=[{path: a, zzzzqqq: 1}]")


def test_unknown_keys_of_a_file_are_named_with_their_line(refusal, own):
    own.write_text("train:\n  steps: 1\n  lerning_rate: 1\ntrian:\n  lr: 1\ndata:\n  sources:\n    - pth: x\n")
    lines = refusal(f"recipe={own}").splitlines()
    for key, line, nearest in (
        ("train.lerning_rate", 3, "train.lr"),
        ("trian", 4, "train"),
        ("data.sources[0].pth", 8, "data.sources[0].path"),
    ):
        [text] = [text for text in lines if f"unknown key {key};" in text]
        assert f"own.yaml:{line})" in text and f"did you mean {nearest}" in text
    assert "got 'y' (command line)" in refusal(f"recipe={own}", "data.sources=[{pth: y}]")


# --- values


@pytest.mark.parametrize(
    ("arguments", "key", "rule"),
    [
        (["data.streaming=true"], "data.validation", "data of its own, or 0"),
        (["data.streaming=true", "data.validation=0", "train.steps=null", "train.epochs=1"], "train", "train.steps"),
        (["data.streaming=true", "data.validation=0", "data.batching=bucketed"], "data.batching", "know all lengths"),
        (["data.sources=[{path: a, weight: 1}, {path: '{b}'}]"], "data.sources", "all have a weight or none; {b} has"),
        (["memory.budget=0.5", "memory.activations=full"], "memory.budget", "got 0.5 and full"),
        (["compile.scope=regions", "compile.regions=[]"], "compile.scope=regions", "one or more of compile.regions"),
        (["train.steps=null"], "train.steps or train.epochs", "must be set"),
        (["train.steps=5", "train.epochs=3"], "train.steps and train.epochs", "got 5 and 3; give one"),
        (
            ["train.optimizer=schedule_free_adamw"],
            "train.optimizer=schedule_free_adamw takes the place of a falling rate",
            "got cosine; set train.schedule=constant",
        ),
    ],
)
def test_keys_that_exclude_or_need_each_other_are_refused(refusal, arguments, key, rule):
    message = refusal("recipe=llama1b", *arguments)
    assert message.startswith(key) and rule in message and len(message.splitlines()) == 1


def test_the_value_that_a_remedy_proposes_is_itself_accepted(refusal):
    for argument in ("train.lr=x", "lora.r=x", "data.sources=", "train.steps=x", "run.trackers=x", "quant.double=x"):
        remedy = refusal("recipe=tiny", argument).split("try ")[1].strip("'")
        resolve(["recipe=tiny", remedy])


def test_a_file_that_sets_both_ends_is_refused_whatever_the_command_line_says(refusal, own):
    own.write_text("train: {steps: 5, epochs: 3}\n")
    for line in ([], ["train.steps=7"]):
        assert "train.steps and train.epochs both set the end" in refusal(f"recipe={own}", *line)


@pytest.mark.parametrize("text", ["[x", "{a", '"a', "'it", "!tag", "[a: b: c", "{path: a: b", "[\x1b[31m"])
def test_a_value_that_yaml_cannot_read_is_to_be_quoted_and_quoted_it_is_read(refusal, text):
    message = refusal("recipe=tiny", f"run.output_dir={text}")
    assert "quote it: " in message and "\x1b" not in message
    remedy = shlex.split(message.split("quote it: ")[1])
    assert resolve(["recipe=tiny", *remedy]).recipe.run.output_dir == text


@pytest.mark.parametrize("value", ["[{path: ./my-chats.jsonl", "[{path: a}", "[a", "{path: a"])
def test_an_unclosed_bracket_is_said_to_be_one(refusal, value):
    message = refusal("recipe=tiny", f"data.sources={value}")
    assert "a bracket or brace is not closed; close it" in message
    assert ("where it is text, quote it" in message) == (not value.startswith("[{"))


@pytest.mark.parametrize("argument", ["recipe=tiny", "recpie=tiny", "mode=show", "report=a.json"])
def test_an_option_written_with_dashes_is_told_without_them(refusal, argument):
    key = argument.split("=")[0].replace("recpie", "recipe")
    assert f"write {key}={argument.split('=')[1]}" in refusal("recipe=tiny", f"--{argument}")


@pytest.mark.parametrize("value", ["[{path: x, split: train[:10%]}]", "[{path: a: b}]", "{path: @a}"])
def test_text_within_a_list_that_yaml_cannot_read_is_to_be_quoted_too(refusal, own, value):
    assert "quote the text in it" in refusal("recipe=tiny", f"data.sources={value}")
    own.write_text(f"train: {{steps: 1}}\ndata:\n  sources: {value}\n")
    message = refusal(f"recipe={own}")
    assert "own.yaml:3: not valid YAML" in message and "in quotes" in message


def test_many_errors_stay_within_five_lines_and_each_key_is_named(refusal):
    names = ("steps", "epochs", "micro_batch", "accumulation", "lr", "warmup", "seed", "log_every")
    message = refusal("recipe=tiny", *[f"train.{name}=x" for name in names])
    assert len(message.splitlines()) == 5 and all(f"train.{name}" in message for name in names)


def test_an_unreadable_recipe_still_reports_the_errors_of_the_command_line(refusal):
    message = refusal("recipe=nope", "train.lr=abc")
    assert "'nope'" in message and "train.lr" in message and "train.epochs" not in message


def test_a_terminal_never_receives_control_codes_from_a_value(refusal, own):
    own.write_text('train: {steps: 1}\nmodel: {dtype: "\\e[31mred\\nsecond"}\n')
    assert "\x1b" not in refusal(f"recipe={own}")
    assert "\x1b" not in refusal("recipe=tiny", "\x1b[31m=1", "mode=\x1b[31m")


# --- as a process


@pytest.mark.parametrize("key", ["train.patience=2", "train.keep_best=true"])
def test_what_compares_eval_losses_is_refused_where_the_recipe_holds_no_row_out(refusal, key):
    message = refusal("recipe=llama1b", key, "train.eval_every=5", "data.validation=0")
    assert message.startswith(f"{key.partition('=')[0]} needs validation rows; got data.validation=0")
    assert resolve(["recipe=llama1b", key, "train.eval_every=5"])
