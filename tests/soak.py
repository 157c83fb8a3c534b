"""Long trials of checkpoints; docs/reliability.md has the figures. Not a test of the suite.

    python tests/soak.py kills [50]     SIGKILL at random moments, every fifth inside a save; the run goes on each time
    python tests/soak.py saves [500]    a checkpoint after every step, one after the other

After the kills metrics.jsonl and the adapter must be, bit for bit, those of a run that was never killed; about six
seconds a kill on a CPU. While a run saves, its resident memory and its open files stay as they are after the first
fifth, and there is a whole checkpoint at every moment.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from launcher.checkpoint.bundle import bundles_of, faults_of  # noqa: E402

STEPS_A_LIFE = 6  # at most, before a kill


def start(folder: Path, *, steps: int) -> subprocess.Popen[bytes]:
    arguments = [
        "recipe=tiny", "compile.mode=off", "train.micro_batch=1", "data.max_length=128", "lora.dropout=0.1",
        "train.save_every=1", "train.eval_every=20", "data.validation=0.01", "run.sample_tokens=0",
        f"train.steps={steps}", f"run.output_dir={folder}",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "launcher" / "main.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what clocks and meters measured; a torn last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in ("step_s", "vram_mib")} for line in read]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in records(folder)), default=0)


def kill_at(process: subprocess.Popen[bytes], folder: Path, *, step: int, in_save: bool) -> bool:
    """Kill the run some milliseconds after `step`, or in the next save; whether a save was going on."""
    while process.poll() is None and last_step(folder) < step:
        time.sleep(0.01)
    staging = folder / "checkpoints"
    while in_save and process.poll() is None and not list(staging.glob("*.part")):
        pass
    time.sleep(0.0 if in_save else random.random() * 0.2)
    process.kill()
    process.wait()
    return bool(list(staging.glob("*.part")))


def many_saves(saves: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, whole, files = Path(scratch) / "run", 0, list[int]()
        process = start(folder, steps=saves)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if bundles_of(folder / "checkpoints"):
                assert any_whole(folder / "checkpoints"), "no checkpoint was whole"
                whole += 1
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if saves // 5 < last_step(folder) < saves:
                        files.append(watched.num_fds())
            time.sleep(0.05)
        finish(process)
        resident = [json.loads(line).get("vram_mib") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resident = [mib for mib in resident if mib][saves // 5 :]
    tenth = len(resident) // 10
    before, after = median(resident[:tenth]), median(resident[-tenth:])
    print(
        f"{saves} saves; {whole} looks, each found a whole checkpoint; resident memory {before:.1f} MiB, then "
        f"{after:.1f} ({after / before - 1:+.2%}); open files {min(files)} to {max(files)}, median {median(files):g}"
    )
    assert abs(after / before - 1) < 0.02, "resident memory drifts"
    half = len(files) // 2
    assert max(files[half:]) <= max(files[:half]), "files stay open"


def any_whole(checkpoints: Path) -> bool:
    """Whether one of the checkpoints is whole; one that goes while it is read is looked for anew."""
    return any(not damages(bundle) for _ in range(3) for bundle in bundles_of(checkpoints))


def damages(bundle: Path) -> list[str]:
    try:
        return list(faults_of(bundle))
    except OSError as error:
        return [str(error)]


def many_kills(kills: int) -> None:
    random.seed(0)
    steps, in_saves, resumes = kills * STEPS_A_LIFE, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        for number in range(kills):
            before = last_step(killed)
            process = start(killed, steps=steps)
            in_saves += kill_at(process, killed, step=before + random.randint(1, STEPS_A_LIFE), in_save=number % 5 == 0)
            assert process.returncode == -9, "the run ended by itself"
            resumes += before > 0
        finish(start(killed, steps=steps))
        finish(start(whole, steps=steps))
        assert records(killed) == records(whole), "metrics.jsonl differs"
        adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (killed, whole)]
        assert adapters[0] == adapters[1], "the adapter differs"
        assert not list(killed.rglob("*.part")) and not (killed / "run.lock").exists(), "something was left"
        parts = len(json.loads((killed / "report.json").read_text())["parts"])
    print(
        f"{kills} kills, {in_saves} inside a save; {resumes + 1} resumes, {parts} parts; metrics and adapter bit-equal"
    )


if __name__ == "__main__":
    trial, default = {"kills": (many_kills, 50), "saves": (many_saves, 500)}[sys.argv[1]]
    trial(int(sys.argv[2]) if len(sys.argv) > 2 else default)
