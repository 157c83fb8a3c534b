"""Device, native libraries and compilers: each check is made to fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config

from launcher.errors import RecipeError
from launcher.preflight import machine
from launcher.preflight.machine import check_bitsandbytes, check_compiler, check_device, runs_on
from launcher.recipe.schema import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"train": {"steps": 1}, **sections})


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code of the same major version
        ((7, 0), ["sm_75", "sm_80", "compute_90"], False),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # by PTX
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((9, 0), [], False),
    ],
)
def test_which_code_runs_on_which_gpu(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert runs_on(capability, built_for) == runs


def test_a_gpu_that_torch_has_no_code_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    with pytest.raises(RecipeError, match=r"GTX 1080 has compute capability 6.1, torch .* built for sm_75, sm_90"):
        check_device(CUDA)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61"])
    assert "GTX 1080" in check_device(CUDA)


def test_a_gpu_whose_driver_is_too_old_does_not_become_a_run_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(machine, "NVIDIA_DEVICES", str(tmp_path / "nvidia[0-9]*"))
    assert check_device(CPU) == "CPU"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RecipeError, match=r"driver on your system is too old \(found version 11040\)\.\nUpdate"):
        check_device(CPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RecipeError, match="built without CUDA"):
        check_device(CPU)
    for name, value in {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert check_device(CPU).startswith("CPU")


@pytest.mark.parametrize("fault", ["library", "values"])
def test_bitsandbytes_that_does_not_quantise_is_refused_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from bitsandbytes import functional

    def without_library(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\nCUDA SETUP ERROR: advice\nOriginal error: libcudart.so.13: cannot open\nmore advice")

    assert check_bitsandbytes(recipe(), CPU) == "quantises on cpu"
    wrong = without_library if fault == "library" else lambda packed, state: torch.zeros(4096)
    monkeypatch.setattr(functional, "dequantize_4bit", wrong)
    says = "Original error: libcudart" if fault == "library" else "come back with an error of 1"
    for needed in (recipe(), recipe(quant={"type": "none"}, train={"steps": 1, "optimizer": "adamw_8bit"})):
        with pytest.raises(RecipeError, match=says):
            check_bitsandbytes(needed, CPU)
    assert check_bitsandbytes(recipe(quant={"type": "none"}), CPU) == "not needed"


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_without_a_cpp_compiler_inductor_is_refused_on_a_cpu(tmp_path: Path, fault: str) -> None:
    assert check_compiler(recipe(), CPU)
    compiler = tmp_path / f"{fault}-g++"  # a name of its own: torch remembers what it has found
    if fault == "broken":
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "omp.h: error: not found" >&2; exit 1; }\n')
        compiler.chmod(0o755)
    says = "there is none" if fault == "missing" else "fails: omp.h: error: not found"
    with config.patch("cpp.cxx", (None, str(compiler))):
        with pytest.raises(RecipeError, match=says):
            check_compiler(recipe(), CPU)
        for unneeded in ({"mode": "off"}, {"backend": "aot_eager"}):
            assert check_compiler(recipe(compile=unneeded), CPU) == "not needed"


def test_triton_needs_a_c_compiler_and_pythons_headers_or_a_warm_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compiles() -> None:
        raise RuntimeError("Failed to find C compiler")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=compiles))
    monkeypatch.setitem(__import__("sys").modules, "triton", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "triton.runtime", SimpleNamespace(driver=driver))
    monkeypatch.setattr(machine, "HAS_TRITON", True)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RecipeError, match=r"Python.h is missing \(RuntimeError: Failed to find C compiler\)"):
        check_compiler(recipe(compile={"mode": "off"}), CUDA)
    (tmp_path / "Python.h").touch()
    assert check_compiler(recipe(), CUDA).endswith("gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="there is none: neither CC nor gcc"):
        check_compiler(recipe(), CUDA)
    driver.active.get_current_target = lambda: None
    assert "cache" in check_compiler(recipe(), CUDA)
