"""A mistyped recipe costs a second: every fault is named with its remedy, all at once, and nothing is left."""

import subprocess
import sys

import pytest

from launcher.recipe.field_types import recipe_names, recipes_dir
from tests.support.refusals import own_recipe, refused


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
def test_fault_01_an_unknown_key_is_named_with_its_nearest_match(argument, nearest):
    message = refused("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert f"unknown key {key}" in message and value.strip("{}")[-1] in message
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("wrong", "says"), [("lerning_rate=1", "did you mean train.lr"), ("model.name=no/where", "Offline")]
)
def test_fault_01_a_wrong_key_ends_the_program_with_code_2_before_torch_and_leaves_nothing(tmp_path, wrong, says):
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
        (
            "data.sources=",
            "a list of {path, format, weight, config, split, revision, columns, template, completion, delimiter}",
        ),
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
def test_fault_02_a_wrong_value_is_answered_with_rule_value_and_remedy(argument, rule):
    message = refused("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert rule in message and key in message and "(command line)" in message and "try " in message
    assert (value.strip("[]{}").split(",")[-1][-1:] or "null") in message or value == "[]"


def test_fault_02_the_suggestion_for_a_wrong_key_states_the_expected_range():
    message = refused("recipe=tiny", "lr=abc", "batch=-1", "lora.alpha=nan")
    assert "a number > 0 and <= 1" in message and "a whole number >= 1" in message and "lora.alpha" in message


def test_fault_02_all_errors_of_both_layers_come_together(tmp_path):
    own = own_recipe(tmp_path)
    own.write_text("train:\n  lr: abc\n  warmup: -1\n")
    message = refused(f"recipe={own}", "batch=-1", "model.dtype=int8")
    for part in ("train.lr", "own.yaml:2", "train.warmup", "unknown key batch", "model.dtype", "train.steps"):
        assert part in message


def test_fault_03_an_unknown_recipe_lists_the_recipes_and_the_nearest():
    message = refused("recipe=llama1")
    assert "'llama1'" in message and "did you mean recipe=llama1b" in message
    assert all(name in message for name in recipe_names())
