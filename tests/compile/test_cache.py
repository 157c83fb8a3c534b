import os
import subprocess
import sys

from launcher.compile.cache import OPS, TAG, key_tag, prepare_cache


def test_the_cache_is_a_private_folder_and_one_that_cannot_be_had_is_replaced_with_a_note(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare_cache(workers=1) is None
    folder = tmp_path / "qlora-launcher" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    note = prepare_cache(workers=1)
    assert "a temporary one is used" in note
    assert os.stat(os.environ["TORCHINDUCTOR_CACHE_DIR"]).st_mode & 0o777 == 0o700


def test_the_key_of_what_is_cached_changes_with_an_operators_source(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("one")
    before = key_tag(tmp_path)
    assert key_tag(tmp_path) == before
    (tmp_path / "a.py").write_text("two")
    assert key_tag(tmp_path) != before
    monkeypatch.delenv(TAG)
    prepare_cache(workers=1)
    assert os.environ[TAG] == key_tag(OPS) and any(OPS.glob("*.py"))


PROGRAM = """
import sys, torch
@torch.library.custom_op("test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, g: g * float(sys.argv[1]))
x = torch.ones(4, requires_grad=True)
torch.compile(lambda x: twice(x).sum(), fullgraph=True)(x).backward()
print(x.grad[0].item())
"""


def test_a_changed_backward_formula_is_not_served_from_the_cache_of_the_one_before(tmp_path):
    def gradient(factor, tag):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), TAG: tag}
        command = [sys.executable, "-c", PROGRAM, str(factor)]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert [gradient(2, "a"), gradient(6, "b")] == [2, 6]
    assert gradient(6, "a") == 2  # what the tag is for
