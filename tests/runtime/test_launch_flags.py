"""What Accelerate was asked for is obeyed, noted or refused, however it was asked: by flag, config file or variable."""

import subprocess
import sys

import pytest

from launcher.errors import RecipeError
from launcher.recipe.schema import ModelSection, TrainSection
from launcher.runtime import launch_flags
from launcher.runtime.launch_flags import check_launch_flags
from tests.conftest import ROOT

# What `accelerate launch --cpu` sets where nothing else is asked for (accelerate 1.15).
PLAIN = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "USE_CPU": "True"}


@pytest.fixture
def asked(monkeypatch):
    """`asked(flags, dtype=..., **variables)`: the notes when Accelerate was launched like this."""

    def check(flags="", *, dtype="auto", **variables):
        for name, value in {**PLAIN, **variables}.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        command = ["python", "/bin/accelerate", "launch", *flags.split(), "launcher/main.py", "--odd=1", "recipe=tiny"]
        monkeypatch.setattr(launch_flags, "parent_command", lambda: command)
        train = TrainSection(steps=1, accumulation=2, clip=1.0)
        return check_launch_flags(ModelSection(dtype=dtype), train, cores=4)

    return check


@pytest.mark.parametrize(
    "flags",
    [
        "", "--cpu --num_processes 2 --config_file a.yaml -m", "--mixed_precision no --dynamo_backend no",
        "--gradient_accumulation_steps 2", "--gradient-accumulation-steps=2", "--num_cpu_threads_per_process 4",
    ],
)  # fmt: skip
def test_what_is_obeyed_or_the_same_gives_no_note(asked, flags):
    assert asked(flags) == ()


def test_the_dtype_that_was_asked_for_gives_no_note_where_the_recipe_names_it(asked):
    assert asked(MIXED_PRECISION="bf16", dtype="bfloat16") == ()


@pytest.mark.parametrize(
    ("flags", "variables", "note"),
    [
        ("--gradient_accumulation_steps 8", {}, "gradient_accumulation_steps=8 has no effect: train.accumulation"),
        ("--gradient-accumulation-steps=8", {}, "gradient_accumulation_steps=8 has no effect: train.accumulation"),
        ("", {"GRADIENT_ACCUMULATION_STEPS": "8"}, "gradient_accumulation_steps=8 has no effect"),
        ("--mixed_precision bf16", {"MIXED_PRECISION": "bf16"}, "mixed_precision=bf16 has no effect: model.dtype"),
        ("--gradient_clipping 0.5", {}, "gradient_clipping=0.5 has no effect: train.clip decides, which is 1.0"),
        ("--num_cpu_threads_per_process 7", {}, "share of the cores decides, which is 4"),
        ("--zero_stage 2", {}, "zero_stage has no effect: no part of the launcher reads it"),
        ("--downcast_bf16 --cpu", {}, "downcast_bf16 has no effect"),
    ],
)
def test_what_has_no_effect_is_noted(asked, flags, variables, note):
    [said] = asked(flags, **variables)
    assert note in said


@pytest.mark.parametrize("flags", ["--aws_secret_access_key topsecret", "--aws-secret-access-key=topsecret"])
def test_the_value_of_a_flag_without_a_counterpart_is_not_told(asked, flags):
    [said] = asked(flags)
    assert "aws_secret_access_key has no effect" in said and "topsecret" not in said


@pytest.mark.parametrize(
    ("flags", "variables", "dtype", "message"),
    [
        ("--mixed_precision bf16", {}, "float32", "it is float32, and accelerate was asked for mixed_precision=bf16"),
        ("", {"MIXED_PRECISION": "fp16"}, "bfloat16", "Set model.dtype=float16"),
        ("", {"MIXED_PRECISION": "fp8"}, "auto", "mixed_precision=fp8"),
        ("", {"DYNAMO_BACKEND": "INDUCTOR"}, "auto", "the recipe decides what is compiled"),
        ("--dynamo_backend=eager", {}, "auto", "dynamo_backend=eager"),
        ("", {"USE_FSDP": "true"}, "auto", "use_fsdp=true"),
        ("--cpu --use_megatron_lm", {}, "auto", "use_megatron_lm=true"),
        ("", {"USE_DEEPSPEED": "true", "DYNAMO_BACKEND": "INDUCTOR"}, "auto", r"(?s)dynamo_backend.*use_deepspeed"),
        ("--tpu", {}, "auto", "each process trains a whole model of its own; accelerate was asked for tpu=true"),
        ("--use_parallelism_config", {}, "auto", "use_parallelism_config"),
    ],
)
def test_what_contradicts_is_refused_with_its_remedy(asked, flags, variables, dtype, message):
    with pytest.raises(RecipeError, match=message) as caught:
        asked(flags, dtype=dtype, **variables)
    assert caught.value.code == 2 and "eave" in str(caught.value)


def test_other_launchers_and_none_at_all_ask_for_nothing(monkeypatch):
    monkeypatch.setattr(launch_flags, "parent_command", lambda: ["bash", "accelerate.sh", "--mixed_precision", "fp8"])
    for name in PLAIN:
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    assert check_launch_flags(ModelSection(), TrainSection(steps=1), cores=1) == ()


def test_the_flags_are_read_from_the_process_that_started_this_one(tmp_path):
    launcher, script = tmp_path / "accelerate", tmp_path / "script.py"
    launcher.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, sys.argv[-1]]))\n")
    script.write_text(
        "import sys\nfrom launcher.recipe.schema import ModelSection, TrainSection\n"
        "from launcher.runtime.launch_flags import check_launch_flags\n"
        "print(*check_launch_flags(ModelSection(), TrainSection(steps=1), cores=1), 'torch' in sys.modules)\n"
    )
    command = [sys.executable, str(launcher), "launch", "--gradient_accumulation_steps", "8", str(script)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert "gradient_accumulation_steps=8 has no effect: train.accumulation decides, which is 1 False" in done.stdout
