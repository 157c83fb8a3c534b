"""mode=export: the folder loads in stock code and is the trained model; refusals leave nothing."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from launcher.export.load_run import open_run
from launcher.export.place import find_run
from launcher.export.proof import make_probe
from launcher.export.write import prepared_data
from launcher.runtime.ranks import RankInfo
from tests.conftest import ROOT, TINY
from tests.export.conftest import Main, trained

CLAIMS = 8  # of a merged export


def in_stock_code(out: Path, run_folder: Path, folder: Path) -> dict[str, object]:
    """What a process without the launcher says of an exported folder, on the documents of the proof."""
    place = find_run(run_folder)
    run = open_run(place, place.recipe.model.name, RankInfo(0, 0, 1, 1))
    documents = [[d.input_ids.tolist(), d.supervised.tolist()] for d in make_probe(prepared_data(run)).documents]
    (folder / "documents.json").write_text(json.dumps(documents))
    (folder / "elsewhere").mkdir()
    command = [
        sys.executable,
        str(ROOT / "tests" / "export" / "stock_merged.py"),
        str(out),
        str(folder / "documents.json"),
    ]
    done = subprocess.run(command, cwd=folder / "elsewhere", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def test_a_merged_folder_gives_the_trained_loss_in_a_process_that_never_imports_the_launcher(
    export: Main, run_folder: Path, tmp_path: Path
) -> None:
    done = export()
    assert done.code == 0, done.err
    assert done.report["holds"] and len(done.report["verdicts"]) == CLAIMS and "PASS" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "report.json"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # whoever reads one reads all
    stock, figures = in_stock_code(tmp_path / "out", run_folder, tmp_path), done.report["figures"]
    assert stock["dtype"] == "torch.bfloat16"
    assert stock["loss"] == pytest.approx(figures["trained_loss"], abs=done.report["limits"]["loss"])
    saved = AutoTokenizer.from_pretrained(run_folder / "adapter")
    chat = [{"role": "user", "content": "Hi"}]
    assert stock["chat"] == saved.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The limit is far below what the adapter changes.
    report = json.loads((run_folder / "report.json").read_text())
    assert report["loss"]["eval_first"] - figures["trained_loss"] > 100 * done.report["limits"]["loss"]


def test_what_makes_up_for_the_rounding_to_nf4_is_not_added_to_weights_that_were_not_rounded(
    main: Main, small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    trained(small_arguments, tmp_path / "run", "train.steps=2", "lora.init=loftq")
    trained(small_arguments, tmp_path / "later", "train.steps=2", f"lora.start_from={tmp_path / 'run' / 'adapter'}")
    for run in ("run", "later"):
        refused = main("mode=export", f"run={run}", "to=out", "on=original")
        assert refused.code == 2 and "makes up for the rounding" in " ".join(refused.err.split()), refused.err
    assert main("mode=export", "run=run", "to=out").code == 0


def test_small_files_get_an_index_and_hold_the_same_weights(export: Main, tmp_path: Path) -> None:
    assert export("dtype=float32").code == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    assert export("dtype=float32", "shard_mib=1").code == 0
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    parts = {name: tensor for path in files for name, tensor in load_file(path).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def test_on_the_original_base_the_weights_are_its_own_plus_the_update(
    export: Main, run_folder: Path, small_model: Path, tmp_path: Path
) -> None:
    done = export("on=original", "dtype=float32")
    assert done.code == 0, done.err
    written, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(small_model / "model.safetensors")
    adapter = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    assert (b @ a).abs().max() > 1e-3
    torch.testing.assert_close(written[f"{name}.weight"], base[f"{name}.weight"] + 2 * b @ a)
    assert torch.equal(written["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        ("lora.targets=[q_proj,v_proj]", "model.dtype=bfloat16"),  # quantised linears without an adapter
        ("quant.type=none",),
        ("quant.double=false", "data.validation=0"),
    ],
)
def test_runs_of_other_kinds_are_exported_too(
    main: Main, small_arguments: tuple[str, ...], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    trained(small_arguments, tmp_path / "run", "train.steps=2", *changes)
    done = main("mode=export", "run=run", "to=out", "report=report.json")
    assert done.code == 0, done.err
    assert done.report["dtype"] == "bfloat16" and len(done.report["verdicts"]) == CLAIMS
    assert ("of training (the run has no validation data)" in done.out) == ("data.validation=0" in changes)


def test_an_exported_adapter_loads_alone_and_is_the_trained_one(export: Main, tmp_path: Path) -> None:
    done = export("format=adapter")
    assert done.code == 0, done.err
    assert done.report["figures"]["loss_difference"] == 0 and done.report["figures"]["agreement"] == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}


def test_a_checkpoint_is_exported_like_the_end_of_the_run(export: Main, main: Main, run_folder: Path) -> None:
    end = export().report["figures"]
    checkpoint = run_folder / "checkpoints" / "step-4"
    done = main("mode=export", f"run={checkpoint}", "to=early", "report=report.json")
    assert done.code == 0, done.err
    assert done.report["figures"]["trained_loss"] > end["trained_loss"] + 0.01
    assert done.report["run"] == str(checkpoint / "adapter")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["to=taken"], 2, "a new or an empty folder"),
        (["run=nowhere"], 2, "is no folder"),
        (["run=taken"], 2, "without an adapter"),
        (["format=adapter", "on=original"], 2, "belongs to format=merged"),
        (["report=taken"], 2, "a folder that can be written"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_torch_works(
    main: Main,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    monkeypatch.setattr("launcher.export.load_run.open_run", lambda *_: pytest.fail("too late"))
    given = {argument.partition("=")[0] for argument in arguments}
    rest = [a for a in (f"run={run_folder}", "to=out") if a.partition("=")[0] not in given]
    done = main("mode=export", *rest, *arguments)
    assert (done.code, done.out) == (code, "") and says in done.err, done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine.txt"]


def test_a_full_disk_is_told_before_anything_is_written(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("launcher.export.merge.shutil.disk_usage", lambda _: usage(10, 10, 1000))
    done = export()
    assert done.code == 7 and "1,000 are free" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_folders_that_are_new_is_made(main: Main, run_folder: Path, tmp_path: Path) -> None:
    done = main("mode=export", f"run={run_folder}", "to=./new/deep/out")
    assert done.code == 0, done.err
    assert (tmp_path / "new" / "deep" / "out" / "model.safetensors").is_file()


def test_a_write_that_fails_leaves_nothing(export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launcher.export.merge.save_file", full)
    assert export().code == 7
    assert list(tmp_path.iterdir()) == []


def test_tied_embeddings_stay_tied_and_weights_already_in_nf4_become_whole(
    main: Main, small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """The base of recipes/tiny is tied; here it is quantised before it is trained on."""
    quantised(TINY / "base", tmp_path / "packed")
    trained(small_arguments, tmp_path / "run", f"model.name={tmp_path / 'packed'}", "train.steps=2")
    done = main("mode=export", "run=run", "to=out", "report=report.json")
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written and written["model.layers.0.mlp.up_proj.weight"].shape == (1024, 384)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    refused = main("mode=export", "run=run", "to=other", "on=original")
    assert refused.code == 2 and "on=dequantised" in refused.err


def quantised(source: Path, folder: Path) -> None:
    """The checkpoint at `source` in NF4, as bitsandbytes saves it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
