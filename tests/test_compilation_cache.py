"""The folder of compiled programs: made for the user alone, refused where others could put code in it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from ppojax import compilation_cache
from ppojax.compilation_cache import UNREAD_DAYS, enable_compilation_cache, user_folder
from ppojax.errors import CannotWriteError, ConfigError

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def jax_as_before() -> Iterator[None]:
    """These tests turn on what `conftest.py` turns off; nothing is compiled meanwhile."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache._if_usable.cache_clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_is_made_for_the_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert enable_compilation_cache(str(folder)) == folder
    assert mode(folder) == 0o700 and jax.config.values["jax_compilation_cache_dir"] == str(folder)
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.0
    assert enable_compilation_cache(str(folder)) == folder


def test_the_users_folder_is_in_their_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # of no meaning, says the specification
    assert enable_compilation_cache("auto") == tmp_path / ".cache/ppojax/compiled"
    assert mode(tmp_path / ".cache/ppojax/compiled") == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_folder() == str(tmp_path / "xdg/ppojax/compiled")


def test_what_jax_was_told_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert enable_compilation_cache("auto") == Path("/elsewhere")
    assert enable_compilation_cache(None) is None and jax.config.values["jax_compilation_cache_dir"] is None
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_compilation_cache("auto") is None and enable_compilation_cache(str(tmp_path / "a")) is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be the home folder."""
    tmp_path.chmod(0o755)
    assert enable_compilation_cache(str(tmp_path)) == tmp_path
    assert mode(tmp_path) == 0o755 and caplog.messages == []


def test_what_others_may_have_put_there_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o775)
    with pytest.raises(ConfigError) as caught:
        enable_compilation_cache(str(folder))
    assert str(caught.value) == (
        f"run.compilation_cache={folder}: others may write there, and what lies there is run as native code; name "
        "another folder, or null, or see that all in it is yours and take that right from them (chmod go-w)"
    )
    assert jax.config.values["jax_compilation_cache_dir"] is None and mode(folder) == 0o775


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"compiled: belongs to another user \(id \d+\), and what lies there is run"):
        enable_compilation_cache(str(tmp_path / "compiled"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError) as caught:
        enable_compilation_cache(str(tmp_path / "file" / "x"))
    assert str(caught.value) == (
        f"run.compilation_cache={tmp_path}/file/x: cannot be written: Not a directory; name another folder, or null"
    )
    with pytest.raises(ConfigError, match=r"~nobody-is-called-this/x: .*; name another folder, or null"):
        enable_compilation_cache("~nobody-is-called-this/x")


def test_a_home_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with caplog.at_level(logging.WARNING):
        assert enable_compilation_cache("auto") is None and enable_compilation_cache("auto") is None
    assert caplog.messages == [
        "compiled programs are not kept for the next start: run.compilation_cache=~/.cache/ppojax/compiled: cannot be "
        "written: Not a directory; name another folder, or null"
    ]


def test_programs_that_nobody_reads_are_forgotten(tmp_path: Path) -> None:
    days = time.time() - (UNREAD_DAYS + 1) * 24 * 3600
    names = ("jit_a-0-cache", "jit_b-1-cache", "my-cache", "notes.txt")
    old, read, mine, other = (tmp_path / name for name in names)
    for path, accessed in ((old, days), (read, time.time()), (mine, days), (other, days)):
        path.write_bytes(b"x")
        os.utime(path, (accessed, days))
    tmp_path.chmod(0o700)
    enable_compilation_cache(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == [read, mine, other]
