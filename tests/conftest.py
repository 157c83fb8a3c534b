"""Shared by all tests: a small model, a recipe on it, one Inductor cache, a share of the machine for each worker."""

import atexit
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.compile.inductor_cache import OPS, TAG, key_tag

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "recipes" / "tiny"

os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"qlora-launcher-tests-{os.getuid()}")
)
os.environ.setdefault(TAG, key_tag(OPS))  # a changed operator must not meet a graph of the one before
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qlora-launcher-tests-")  # no test reads an earlier run's data
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as launcher/runtime/environment.py sets it, which says why
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its workers; consoles are as wide as without it

MAX_WORKERS = 8  # each imports torch: about a GiB
GPU_WORKER_BYTES = 18 * 2**30  # what a test of the 1B shape may hold, its naive side included


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `-n auto`: one a core; for the GPU tests up to four a GPU, which mostly wait for the compiler."""
    cores = len(os.sched_getaffinity(0))
    if config.option.markexpr != "gpu":
        return min(MAX_WORKERS, cores)
    import torch

    gpus = range(torch.cuda.device_count())
    room = [torch.cuda.get_device_properties(gpu).total_memory // GPU_WORKER_BYTES for gpu in gpus]
    return max(1, sum(min(4, cores // (4 * len(gpus)), most) for most in room))


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker its share of the cores, and one GPU."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker:
        return
    index, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[index::count] or cores)
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))  # torch must not be asked before the choice is made
    if config.option.markexpr == "gpu" and gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % gpus)


WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 8192}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def small_config(model_type: str = "llama", **changes: Any) -> Any:
    """A transformers config of a family at test size, with room for the tiny tokenizer's vocabulary."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**WIDTH, **HEADS, **changes})


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a full fp32 checkpoint of a two-layer Llama and the tiny tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("small-model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config())
    with torch.no_grad():  # larger than the default initialisation: attention and MLP must matter to the loss
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short chats of the shipped set."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(TINY / "train.jsonl", encoding="utf-8") as shipped:
        file.write_text("".join(next(shipped) for _ in range(60)), encoding="utf-8")
    return file


def small_recipe(small_model: Path, rows_file: Path, folder: Path, **sections: dict[str, Any]) -> Any:
    """A recipe on the small model with aot_eager, four steps and `folder`/run; sections are merged over that."""
    from launcher.recipe.schema import Recipe

    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(small_model)},
        "lora": {"r": 4},
        "data": {"sources": [{"path": str(rows_file)}], "max_length": 64, "validation": 0.1},
        "compile": {"backend": "aot_eager"},
        "train": {"steps": 4, "micro_batch": 2, "lr": 1e-3},
        "run": {"output_dir": str(folder / "run"), "sample_tokens": 4},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Recipe.model_validate(base)


@pytest.fixture
def make_recipe(small_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """`small_recipe`, in the test's own folder."""
    return lambda **sections: small_recipe(small_model, rows_file, tmp_path, **sections)


@pytest.fixture
def make(make_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Recipes of eight uncompiled steps that save every second one, in the folder `run` unless another is named."""

    def recipe(folder: str = "run", **sections: Any) -> Any:
        train = {"steps": 8, "save_every": 2, "eval_every": 4, **sections.pop("train", {})}
        place = {"output_dir": str(tmp_path / folder), **sections.pop("run", {})}
        return make_recipe(**{"compile": {"mode": "off"}, **sections}, train=train, run=place)

    return recipe


@pytest.fixture
def killed(make: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a run that ended as by a kill, its checkpoints of the steps 2 and 4 whole."""
    from tests.support.runs import trained

    trained(make(), until=6)
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints" / "step-6", ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def small_arguments(small_model: Path, rows_file: Path) -> tuple[str, ...]:
    """Command-line arguments of a run on the small model."""
    return (
        "recipe=tiny", f"model.name={small_model}", f"data.sources=[{{path: {rows_file}}}]", "data.validation=0.1",
        "data.max_length=64", "compile.backend=aot_eager", "lora.r=4", "train.lr=1e-3", "train.steps=2",
        "run.sample_tokens=4",
    )  # fmt: skip


def request_for(recipe: Any) -> Any:
    """The request of a single process to run `recipe`."""
    from launcher.recipe.locate import locate
    from launcher.runtime.ranks import RankInfo
    from launcher.train.request import Request

    shipped = ROOT / "recipes"
    return Request(recipe, "test", locate(recipe.model, shipped / "architectures"), shipped, RankInfo(0, 0, 1, 1))


def stock_loss(history: Any, folder: Path, *, dtype: str, device: str) -> float:
    """The validation loss that stock PEFT gives to a finished run's adapter, in another process and folder."""
    from launcher.data.pack.micro_batch import micro_batch_of

    validation = history.worker.prepared.data.validation
    documents = []
    batch = micro_batch_of(validation, range(len(validation)))
    for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        for where in (numbers == number for number in set(numbers.tolist())):
            if (labels[where] != -100).any():
                documents.append([ids[where].tolist(), labels[where].tolist()])
    probe, elsewhere = folder / "probe.json", folder / "elsewhere"
    probe.write_text(json.dumps(documents), encoding="utf-8")
    elsewhere.mkdir()
    script = str(ROOT / "tests" / "train" / "stock_peft.py")
    command = [sys.executable, script, str(history.worker.folder.adapter), str(probe), dtype, device]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    """No cached frames and no armed guard, before and after."""
    import torch._dynamo

    from launcher.compile.dynamo_config import set_in_all_threads

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    set_in_all_threads("error_on_recompile", False)


@pytest.fixture
def clean_dynamo() -> Iterator[None]:
    """`fresh_dynamo` around a test."""
    with fresh_dynamo():
        yield
