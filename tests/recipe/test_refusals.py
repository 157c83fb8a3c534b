"""Every wrong command line and recipe is refused with rule, value and remedy, all at once, and nothing in it runs."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.recipe.field_types import recipes_dir
from launcher.recipe.load import resolve

Refusal = Callable[..., str]  # the fixture: arguments in, message out

# --- arguments


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("tiny", "did you mean recipe=tiny"),
        ("--verbose", "key=value"),
        ("=3", "key=value"),
        ("mode=paint", "train, parity, bench, preview, show"),
        ("mode=", "train, parity, bench, preview, show"),
        ("train.lr=[1", "train.lr"),
        ("train.lr=!!python/name:os.system", "tag"),
        ("report=", "report"),
        ("blocks=3", "mode=train; remove"),
    ],
)
def test_a_malformed_argument_is_refused(refusal: Refusal, argument: str, says: str) -> None:
    message = refusal("recipe=tiny", argument)
    assert says in message and argument.split("=")[0] in message


@pytest.mark.parametrize("blocks", ["", "-1", "two", "1.5", "²", "9" * 5000])
def test_a_number_of_blocks_that_is_none_is_refused(refusal: Refusal, blocks: str) -> None:
    message = refusal("recipe=tiny", "mode=preview", f"blocks={blocks}")
    assert "a whole number >= 0" in message and "try blocks=2" in message and len(message) < 200


def test_what_another_mode_reads_is_refused(refusal: Refusal) -> None:
    assert "mode=show; remove" in refusal("recipe=tiny", "mode=show", "blocks=1")
    assert "'r.json'" in refusal("recipe=tiny", "mode=preview", "report=r.json")


@pytest.mark.parametrize(
    "argv",
    [
        ("train.lr=1e-3", "train.lr=1e-4"),
        ("train={lr: 1e-3}", "train.lr=1e-4"),
        ("mode=show", "mode=train"),
        ("mode=preview", "blocks=1", "blocks=1"),
        ("recipe=tiny",),
    ],
)
def test_a_key_given_twice_is_refused(refusal: Refusal, argv: tuple[str, ...]) -> None:
    assert "twice" in refusal("recipe=tiny", *argv)


# --- unknown keys


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("lerning_rate=1", "train.lr"),
        ("train.lerning_rate=1", "train.lr"),
        ("trian.lr=1", "train.lr"),
        ("train.lrr=1", "train.lr"),
        ("train.max_length=9", "data.max_length"),
        ("train.lora_alpha=9", "lora.alpha"),
        ("lr=abc", "train.lr"),
        ("batch=-1", "train.micro_batch"),
        ("train.micro-batch=2", "train.micro_batch"),
        ("--train.lr=1", "train.lr"),
        ("lora_alpha=3", "lora.alpha"),
        ("max_seq_length=3", "data.max_length"),
        ("data.sources[0].path=x", "data.sources"),
        ("data.sources.0.path=x", "data.sources"),
        ("trian={lr: 1}", "train"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_match(refusal: Refusal, argument: str, meant: str) -> None:
    message = refusal("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert f"unknown key {key}" in message and value.strip("{}")[-1] in message
    assert f"did you mean {meant}" in message


def test_the_suggestion_for_a_wrong_key_states_the_expected_range(refusal: Refusal) -> None:
    message = refusal("recipe=tiny", "lr=abc", "batch=-1", "lora.alpha=nan")
    assert "a number > 0 and <= 1" in message and "a whole number >= 1" in message and "lora.alpha" in message


def test_a_key_like_nothing_lists_what_there_is(refusal: Refusal) -> None:
    assert all(section in refusal("recipe=tiny", "zzzzqqq=1") for section in ("model", "train", "run"))
    assert "train has steps, epochs" in refusal("recipe=tiny", "train.zzzz=1")
    assert "data.sources[0] has path, format" in refusal("recipe=tiny", "data.sources=[{path: a, zzzzqqq: 1}]")


def test_unknown_keys_of_a_file_are_named_with_their_line(refusal: Refusal, own: Path) -> None:
    own.write_text("train:\n  steps: 1\n  lerning_rate: 1\ntrian:\n  lr: 1\ndata:\n  sources:\n    - pth: x\n")
    message = refusal(f"recipe={own}")
    assert "did you mean train.lr" in message and "own.yaml:3" in message
    assert "did you mean train" in message and "own.yaml:4" in message
    assert (
        "data.sources[0].pth" in message and "did you mean data.sources[0].path" in message and "own.yaml:8" in message
    )


# --- values


@pytest.mark.parametrize(
    ("argument", "rule"),
    [
        ("train.lr=abc", "a number > 0 and <= 1"),
        ("train.lr=true", "a number > 0 and <= 1"),
        ("train.lr=nan", "a number > 0 and <= 1"),
        ("train.micro_batch=-1", "a whole number >= 1"),
        ("train.micro_batch=1.5", "a whole number >= 1"),
        ("lora.r=4096", "a whole number from 1 to 1024"),
        ("lora.dropout=1", "a number >= 0 and < 1"),
        ("model.dtype=int8", "one of auto, float32, bfloat16, float16"),
        ("model.name=", "text"),
        ("quant.double=perhaps", "true or false"),
        ("lora.targets=q_proj", "a list of text"),
        ("compile.regions=[mlp,mpl]", "one of mlp, rmsnorm, attention, loss"),
        ("data.sources=a.jsonl", "a list of {path, format, weight, config, split, revision}"),
        ("data.sources=[]", "at least 1"),
        ("lora.targets={a: b}", "a list of text"),
        ("train.lr={a: b}", "a number > 0 and <= 1"),
        ("data.validation=1.5", "a number >= 0 and < 1, or text"),
        ("train.clip=-1", "a number > 0, or null"),
        ("train=5", "train is a section"),
    ],
)
def test_a_wrong_value_is_answered_with_rule_value_and_remedy(refusal: Refusal, argument: str, rule: str) -> None:
    message = refusal("recipe=tiny", argument)
    key, _, value = argument.partition("=")
    assert rule in message and key in message and "try " in message
    assert (value.strip("[]{}").split(",")[-1][-1:] or "null") in message or value == "[]"


def test_the_value_that_a_remedy_proposes_is_itself_accepted(refusal: Refusal) -> None:
    for argument in ("train.lr=x", "lora.r=x", "data.sources=x", "train.steps=x", "run.trackers=x", "quant.double=x"):
        remedy = refusal("recipe=tiny", argument).split("try ")[1].strip("'")
        resolve(["recipe=tiny", remedy])


def test_all_errors_of_a_recipe_come_together(refusal: Refusal, own: Path) -> None:
    own.write_text("train:\n  lr: abc\n  warmup: -1\n")
    message = refusal(f"recipe={own}", "batch=-1", "model.dtype=int8")
    for part in ("train.lr", "own.yaml:2", "train.warmup", "unknown key batch", "model.dtype", "train.steps"):
        assert part in message


def test_many_errors_stay_within_five_lines_and_each_key_is_named(refusal: Refusal) -> None:
    keys = [
        f"train.{key}"
        for key in ("steps", "epochs", "micro_batch", "accumulation", "lr", "warmup", "seed", "log_every")
    ]
    message = refusal("recipe=tiny", *[f"{key}=x" for key in keys])
    assert len(message.splitlines()) == 5 and all(key in message for key in keys)


def test_an_unreadable_recipe_still_reports_the_errors_of_the_command_line(refusal: Refusal) -> None:
    message = refusal("recipe=nope", "train.lr=abc")
    assert "'nope'" in message and "train.lr" in message and "train.epochs" not in message


# --- what must never run


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "a${train.lr}b", "${oops"])
def test_interpolation_is_refused_in_every_layer_and_never_resolved(
    refusal: Refusal, own: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SECRET", "hidden-token")
    for argument in (
        f"model.name={text}",
        f"lora.targets=[{text!r}]",
        f"run.output_dir={text}",
        f"report={text}",
        f"recipe={text}",
    ):
        message = refusal("recipe=tiny", argument) if "recipe" not in argument else refusal(argument)
        assert "interpolation" in message and "hidden-token" not in message
    own.write_text(f"train: {{steps: 1}}\nmodel:\n  name: {text!r}\n")
    assert "interpolation" in refusal(f"recipe={own}", "model.name=other")
    own.write_text(f"train: {{steps: 1}}\n{text!r}: 1\n")
    assert "interpolation" in refusal(f"recipe={own}")


def test_a_target_is_refused_in_every_layer(refusal: Refusal, own: Path) -> None:
    own.write_text("train: {steps: 1}\nmodel:\n  _target_: os.system\n")
    assert "_target_" in refusal(f"recipe={own}") and "own.yaml:3" in refusal(f"recipe={own}")
    own.write_text("train: {steps: 1}\ndata:\n  sources: [{path: a, _target_: os.system}]\n")
    assert "_target_" in refusal(f"recipe={own}")
    assert "_target_" in refusal("recipe=tiny", "model._target_=os.system")
    assert "_target_" in refusal("recipe=tiny", "data.sources=[{_target_: os.system}]")


def test_a_value_that_omegaconf_reads_as_missing_is_refused(refusal: Refusal) -> None:
    assert "???" in refusal("recipe=tiny", "model.name=???")


def test_a_terminal_never_receives_control_codes_from_a_value(refusal: Refusal, own: Path) -> None:
    own.write_text('train: {steps: 1}\nmodel: {dtype: "\\e[31mred\\nsecond"}\n')
    assert "\x1b" not in refusal(f"recipe={own}")
    assert "\x1b" not in refusal("recipe=tiny", "\x1b[31m=1", "mode=\x1b[31m")


# --- as a process


def test_a_bad_key_ends_the_program_within_a_second_with_code_2_and_leaves_nothing(tmp_path: Path) -> None:
    main = recipes_dir().parent / "launcher" / "main.py"
    before_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(
        [sys.executable, main, "recipe=tiny", "lerning_rate=1"], cwd=tmp_path, capture_output=True, text=True
    )
    # Of the processor, since the clock of a busy machine measures its neighbours.
    elapsed_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before_s
    assert done.returncode == 2
    assert "did you mean train.lr" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert 0 < elapsed_s < 1.0


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        (["data.streaming=true"], "data.validation", "data of its own, or 0"),
        (["data.streaming=true", "data.validation=0", "train.steps=null", "train.epochs=1"], "train", "train.steps"),
        (["data.streaming=true", "data.validation=0", "data.batching=bucketed"], "data.batching", "know all lengths"),
        (["data.sources=[{path: a.jsonl, weight: 1}, {path: b.jsonl}]"], "data.sources", "all have a weight or none"),
    ],
)
def test_keys_of_the_data_that_exclude_each_other_are_refused(
    refusal: Callable[..., str], arguments: list[str], key: str, says: str
) -> None:
    message = refusal("recipe=llama1b", *arguments)
    assert message.startswith(key)
    assert says in message
    assert len(message.splitlines()) == 1
