"""Every wrong command line and recipe is refused with rule, value and remedy, all at once, and nothing in it runs."""

import shlex
import subprocess
import sys

import pytest

from launcher.recipe.field_types import recipes_dir
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
        ("mode=paint", "train, parity, bench, preview, generate, export, show"),
        ("mode=", "train, parity, bench, preview, generate, export, show"),
        ("train.lr=[1", "not valid YAML"),
        ("train.lr=!!python/name:os.system", "tag"),
        ("lora.targets=[&x,*x]", "alias"),
        ("report=", "a path"),
        ("blocks=3", "mode=train; remove"),
        ("mode=show blocks=1", "mode=show; remove"),
        ("mode=preview report=r.json", "'r.json'"),
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


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("lerning_rate=1", "train.lr"),
        ("train.lerning_rate=1", "train.lr"),
        ("trian.lr=1", "train.lr"),
        ("train.lrr=1", "train.lr"),
        ("train.max_length=9", "data.max_length"),
        ("lora.lr=9", "train.lr"),
        ("train.lora_alpha=9", "lora.alpha"),
        ("train.micro-batch=2", "train.micro_batch"),
        ("--train.lr=1", "train.lr"),
        ("max_seq_length=3", "data.max_length"),
        ("data.sources[0].path=x", "data.sources"),
        ("data.sources.0.path=x", "data.sources"),
        ("train.lr[0].x=1", "train.lr"),
        ("trian={lr: 1}", "train"),
        ("bf16=true", "model.dtype"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_match(refusal, argument, nearest):
    message = refusal("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert f"unknown key {key}" in message and value.strip("{}")[-1] in message
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize("key", ["train.save_steps", "save_total_limit", "data.bad_words", "lora.from"])
def test_a_key_with_another_word_is_no_misspelling(refusal, key):
    message = refusal("recipe=tiny", f"{key}=5")
    assert f"unknown key {key}" in message and "did you mean" not in message and " has " in message


def test_the_suggestion_for_a_wrong_key_states_the_expected_range(refusal):
    message = refusal("recipe=tiny", "lr=abc", "batch=-1", "lora.alpha=nan")
    assert "a number > 0 and <= 1" in message and "a whole number >= 1" in message and "lora.alpha" in message


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
    ("argument", "rule"),
    [
        ("train.lr=abc", "a number > 0 and <= 1"),
        ("train.lr=true", "a number > 0 and <= 1"),
        ("train.micro_batch=-1", "a whole number >= 1"),
        ("train.micro_batch=1.5", "a whole number >= 1"),
        ("lora.r=4096", "a whole number from 1 to 1024"),
        ("lora.dropout=1", "a number >= 0 and < 1"),
        ("model.dtype=int8", "one of auto, float32, bfloat16, float16"),
        ("model.name=", "text"),
        ("quant.double=perhaps", "true or false"),
        ("lora.targets=", "a list of text"),
        ("lora.targets=[q_proj,q_proj]", "each once"),
        ("compile.regions=[mlp,mpl]", "one of mlp, rmsnorm, attention, loss"),
        ("data.sources=", "a list of {path, format, weight, config, split, revision}"),
        ("data.sources=[]", "at least 1"),
        ("train.lr={a: b}", "a number > 0 and <= 1"),
        ("data.validation={path: a, pth: b}", "or {path, format"),
        ("data.validation=1.5", "a number >= 0 and < 1, or text"),
        ("train.clip=-1", "a number > 0, or null"),
        ("train.save_every=10x", "be steps (a whole number >= 0), or a time as 90s, 10m or 2h, or off;"),
        ("train.save_every=5min", "be steps (a whole number >= 0), or a time as 90s, 10m or 2h, or off;"),
        ("train=5", "train is a section; got '5' (command line); try train.steps=5"),
        ("train=cosine", "try train.schedule=cosine"),
        ("train=0.5", "try train.epochs=0.5"),
        ("data=./a.jsonl", "got './a.jsonl' (command line); try data.sources=./a.jsonl"),
        ("lora=8", "try lora.r=8"),
        ("compile=off", "try compile.mode=off"),
        ("quant=8bit", "try quant.type=nf4"),
    ],
)
def test_a_wrong_value_is_answered_with_rule_value_and_remedy(refusal, argument, rule):
    message = refusal("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert rule in message and key in message and "(command line)" in message and "try " in message
    assert (value.strip("[]{}").split(",")[-1][-1:] or "null") in message or value == "[]"


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
    ],
)
def test_keys_that_exclude_or_need_each_other_are_refused(refusal, arguments, key, rule):
    message = refusal("recipe=llama1b", *arguments)
    assert message.startswith(key) and rule in message and len(message.splitlines()) == 1


def test_the_value_that_a_remedy_proposes_is_itself_accepted(refusal):
    for argument in ("train.lr=x", "lora.r=x", "data.sources=", "train.steps=x", "run.trackers=x", "quant.double=x"):
        remedy = refusal("recipe=tiny", argument).split("try ")[1].strip("'")
        resolve(["recipe=tiny", remedy])


def test_all_errors_of_both_layers_come_together(refusal, own):
    own.write_text("train:\n  lr: abc\n  warmup: -1\n")
    message = refusal(f"recipe={own}", "batch=-1", "model.dtype=int8")
    for part in ("train.lr", "own.yaml:2", "train.warmup", "unknown key batch", "model.dtype", "train.steps"):
        assert part in message


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


@pytest.mark.parametrize(
    ("wrong", "says"), [("lerning_rate=1", "did you mean train.lr"), ("model.name=no/where", "Offline")]
)
def test_a_wrong_recipe_ends_the_program_with_code_2_before_torch_and_leaves_nothing(tmp_path, wrong, says):
    main = recipes_dir().parent / "launcher" / "main.py"
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(main)!r}, 'recipe=tiny', {wrong!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(len(sys.modules), *{'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    modules, *slow = done.stdout.split()
    assert (done.returncode, slow) == (2, [])
    assert int(modules) < 900, "380, and 570 with the hub's client; torch and transformers alone are 2,000"
    assert says in done.stderr and len(done.stderr.splitlines()) <= 5
    assert list(tmp_path.iterdir()) == []
