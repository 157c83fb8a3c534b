"""The shipped configurations of `accelerate launch` are whole: it has no default to announce."""

import argparse
from pathlib import Path

import psutil
import pytest
from accelerate.commands import launch

from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("config", [*CONFIGS, None], ids=[*(path.name for path in CONFIGS), "none"])
def test_a_shipped_configuration_silences_the_notice_of_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Path | None
) -> None:
    """On a machine with many cores, where there are most defaults to announce."""
    notices: list[str] = []
    started: list[argparse.Namespace] = []
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(launch.logger, "warning", notices.append)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, started.append)
    given = ["--config_file", str(config)] if config else []
    launch.launch_command(launch.launch_command_parser().parse_args([*given, "launcher/main.py"]))
    assert len(started) == 1
    assert len(notices) == (config is None), notices
