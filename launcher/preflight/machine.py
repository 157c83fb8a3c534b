"""What a run needs of the device and of the tools on this machine."""

import glob
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from launcher.errors import RecipeError
from launcher.ops.projection_group import HAS_TRITON
from launcher.recipe.schema import Recipe
from launcher.train.optim import LIBRARIES

NVIDIA_DEVICES = "/dev/nvidia[0-9]*"
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")  # of torch.cuda.get_arch_list(), as sm_90 or sm_100a
ROUNDING = 0.2  # NF4's largest error for values within -1 and 1 is 0.15
INCLUDED = b"#include <cmath>\n#include <omp.h>\nint main() { return 0; }\n"  # by what Inductor writes for a CPU


def check_device(device: torch.device) -> str:
    """Raise RecipeError for a GPU that this torch has no code for, or that it cannot use at all."""
    if device.type == "cuda":
        capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        if not runs_on(capability, architectures):
            raise RecipeError(
                f"torch must have code for the GPU; {torch.cuda.get_device_name(device)} has compute capability "
                f"{capability[0]}.{capability[1]}, torch {torch.__version__} is built for {', '.join(architectures)}.\n"
                "Install a torch that is built for it, use another GPU, or set ACCELERATE_USE_CPU=true."
            )
        return f"{device} {torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
    if torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU") or not glob.glob(NVIDIA_DEVICES):
        return "CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CPU, as CUDA_VISIBLE_DEVICES says"
    raise RecipeError(
        f"a GPU that is there must be usable; this machine has one and torch {torch.__version__} cannot use it: "
        f"{_why_no_cuda()}.\nUpdate the driver or install a torch that fits it, or train on the CPU with "
        "ACCELERATE_USE_CPU=true."
    )


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for one of these architectures runs on a GPU of this compute capability: machine code on the same
    major version from its minor version on, PTX (compute_) on any later one; what is specific to one (sm_90a) only
    there."""
    for kind, major, minor, suffix in (found.groups() for found in map(ARCHITECTURE.fullmatch, architectures) if found):
        built = int(major), int(minor)
        if suffix == "a":
            fits = built == capability
        elif kind == "sm" or suffix:
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError with the driver's version, AssertionError, ...
        return " ".join(str(error).split())[:200].rstrip(".")
    return "it finds no device"


def check_bitsandbytes(recipe: Recipe, device: torch.device) -> str:
    """Quantise and dequantise on the device. Raises RecipeError where bitsandbytes cannot: it can be imported without
    its native library."""
    library, _ = LIBRARIES[recipe.train.optimizer]
    if recipe.quant.type == "none" and not library.startswith("bitsandbytes"):
        return "not needed"
    from bitsandbytes import functional

    try:
        weight = torch.linspace(-1, 1, 4096, device=device)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=recipe.quant.double)
        error = float((functional.dequantize_4bit(packed, state) - weight).abs().max())
    except Exception as failure:  # what is wrong with a library may show as any error
        raise _without_native_library(device, _first_words(failure)) from None
    if not error < ROUNDING:
        raise _without_native_library(device, f"values come back with an error of {error:.2g}")
    return f"quantises on {device}"


def _without_native_library(device: torch.device, why: str) -> RecipeError:
    return RecipeError(
        f"bitsandbytes must quantise on {device}; it fails: {why}\n"
        "python -m bitsandbytes tells more. Install the bitsandbytes that fits this torch and its CUDA, or train "
        "unquantised with quant.type=none and train.optimizer=adamw."
    )


def _first_words(error: Exception) -> str:
    """The most telling line of an error: bitsandbytes writes a page of advice around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    original = [line for line in lines if line.startswith("Original error:")]
    return f"{type(error).__name__}: {[*original, *lines, ''][0][:200]}"


def check_compiler(recipe: Recipe, device: torch.device) -> str:
    """Raise RecipeError where Inductor (on a CPU) or Triton (on a GPU, for the kernels of launcher/ops too) needs a
    compiler that is not there."""
    if device.type == "cuda":
        return _check_triton() if HAS_TRITON else "not needed: Triton is not installed"
    if recipe.compile.mode == "off" or recipe.compile.backend != "inductor":
        return "not needed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception:  # InvalidCxxCompiler, or what starting it raises
        raise _without_compiler("there is none: neither CXX nor g++ names one") from None
    command = [compiler, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(command, input=INCLUDED, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise _without_compiler(f"{compiler} fails: {next((line for line in lines if 'error' in line), lines[:1])}")
    return compiler


def _without_compiler(found: str) -> RecipeError:
    return RecipeError(
        f"compile.mode={{strict,warn}} on a CPU needs a C++ compiler with its headers and OpenMP; {found}.\n"
        "Install it (apt install g++) or name one in CXX, or set compile.mode=off."
    )


def _check_triton() -> str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if compiler and shutil.which(compiler) and header.is_file():
        return compiler
    from triton.runtime import driver

    try:
        driver.active.get_current_target()  # compiles what Triton needs of the driver, unless it is in the cache
    except Exception as error:  # CalledProcessError, RuntimeError, ImportError: by the version
        missing = f"{header} is missing" if compiler and shutil.which(compiler) else "there is none: neither CC nor gcc"
        raise RecipeError(
            f"Triton needs a C compiler and Python's headers; {missing} ({_first_words(error)}).\n"
            "Install them (apt install gcc python3-dev), or name a compiler in CC."
        ) from None
    return "not found, but what Triton needs is in its cache"
