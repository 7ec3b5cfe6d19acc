"""Compiled kernels are copied from the Volume before a load, and new ones back after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modal_backend import compile_cache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache"


def write(path: Path, content: str, age: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))


def test_the_first_load_finds_nothing_and_leaves_what_it_compiled(home: Path) -> None:
    compile_cache.fetch()
    assert not compile_cache.store()
    write(home / "vllm" / "torch_compile_cache" / "a" / "kernel.so", "compiled")
    assert compile_cache.store()
    stored = home / "vllm-jit" / "torch_compile_cache" / "a" / "kernel.so"
    assert stored.read_text() == "compiled"


def test_a_later_load_finds_it_and_has_nothing_to_store(home: Path) -> None:
    write(home / "vllm-jit" / "a" / "kernel.so", "compiled")
    compile_cache.fetch()
    assert (home / "vllm" / "a" / "kernel.so").read_text() == "compiled"
    assert not compile_cache.store()


def test_what_was_compiled_anew_replaces_what_was_stored(home: Path) -> None:
    write(home / "vllm-jit" / "kernel.so", "old one!", age=60)
    write(home / "vllm" / "kernel.so", "new one!")
    assert compile_cache.store()
    assert (home / "vllm-jit" / "kernel.so").read_text() == "new one!"


def test_a_cache_that_fails_costs_time_only(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(home / "vllm-jit" / "a" / "kernel.so", "compiled")
    write(home / "vllm" / "a", "a file where a folder should be")
    compile_cache.fetch()
    assert "were not copied" in caplog.text
