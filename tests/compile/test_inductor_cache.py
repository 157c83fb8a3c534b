import os

from launcher.compile.inductor_cache import OPS, TAG, key_tag, prepare_cache


def test_the_cache_is_a_private_folder_and_an_unusable_one_is_replaced_with_a_note(monkeypatch, tmp_path):
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare_cache(workers=1) is None
    folder = tmp_path / "qlora-launcher" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")  # for our own kernels
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    note = prepare_cache(workers=1)
    assert "a temporary one is used" in note
    assert os.stat(os.environ["TORCHINDUCTOR_CACHE_DIR"]).st_mode & 0o777 == 0o700


def test_folders_that_the_user_has_set_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "b"))
    assert prepare_cache(workers=1) is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "b")


def test_the_cache_key_changes_with_an_operators_source(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("one")
    before = key_tag(tmp_path)
    assert key_tag(tmp_path) == before
    (tmp_path / "a.py").write_text("two")
    assert key_tag(tmp_path) != before
    monkeypatch.delenv(TAG)
    prepare_cache(workers=1)
    assert os.environ[TAG] == key_tag(OPS) and any(OPS.glob("*.py"))
