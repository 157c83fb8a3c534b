"""Shared small things: a two-layer model folder, a recipe on it, and one Inductor cache for the whole suite."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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


@pytest.fixture
def make_recipe(small_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Recipe factory: the small model, aot_eager, four steps; sections given are merged over that."""
    from launcher.recipe.schema import Recipe

    def make(**sections: dict[str, Any]) -> Recipe:
        base: dict[str, dict[str, Any]] = {
            "model": {"name": str(small_model)},
            "lora": {"r": 4},
            "data": {"sources": [{"path": str(rows_file)}], "max_length": 64, "validation": 0.1},
            "compile": {"backend": "aot_eager"},
            "train": {"steps": 4, "micro_batch": 2, "lr": 1e-3},
            "run": {"output_dir": str(tmp_path / "run"), "sample_tokens": 4},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
        return Recipe.model_validate(base)

    return make


def request_for(recipe: Any) -> Any:
    """The request of a single process to run `recipe`."""
    from launcher.recipe.locate import locate
    from launcher.runtime.ranks import RankInfo
    from launcher.train.request import Request

    shipped = ROOT / "recipes"
    return Request(recipe, "test", locate(recipe.model, shipped / "architectures"), shipped, RankInfo(0, 0, 1, 1))


def stock_loss(progress: Any, folder: Path, *, dtype: str, device: str) -> float:
    """The validation loss that stock PEFT gives to a finished run's adapter, in another process and folder."""
    validation = progress.worker.prepared.data.validation
    documents = []
    arrays = validation.arrays(range(validation.rows))
    for ids, labels, numbers in zip(arrays.input_ids, arrays.labels, arrays.document_ids, strict=True):
        for where in (numbers == number for number in set(numbers.tolist())):
            if (labels[where] != -100).any():
                documents.append([ids[where].tolist(), labels[where].tolist()])
    probe, elsewhere = folder / "probe.json", folder / "elsewhere"
    probe.write_text(json.dumps(documents), encoding="utf-8")
    elsewhere.mkdir()
    script = str(ROOT / "tests" / "train" / "stock_peft.py")
    command = [sys.executable, script, str(progress.worker.folder.adapter), str(probe), dtype, device]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.fixture
def clean_dynamo() -> Iterator[None]:
    """Leave dynamo as it was found: no cached frames, no armed guard."""
    import torch
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = False
