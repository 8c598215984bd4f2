"""Compiling: once, into a cache folder under a name of its own; what cannot be compiled says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import build_engine
from engine.kernels.cpu.build import KernelsUnavailable, build_library
from engine.kernels.cpu.library import CpuKernels
from engine.tiny.random_checkpoint import make_random_checkpoint


def compiler(path: Path, script: str) -> str:
    """A stand-in for cc."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    fake = compiler(
        tmp_path / "cc", f'echo "$*" >> {log}; for last; do :; done; [ "$1" = --version ] || echo x > "$last"'
    )
    first = build_library(tmp_path / "cache", compiler=fake)
    assert build_library(tmp_path / "cache", compiler=fake) == first
    assert sum("--version" not in line for line in log.read_text().splitlines()) == 1
    assert build_library(tmp_path / "cache", compiler=fake, extra_flags=("-g",)) != first
    assert sorted(path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()) == [".so", ".so"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            '[ "$1" = --version ] || { echo "simd.h:20: error: no kernels for this processor" >&2; exit 1; }',
            "no kernels",
        ),
        ('[ "$1" = --version ] || exit 3', "no message"),
    ],
)
def test_a_failing_compiler_is_quoted(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(KernelsUnavailable, match=message):
        build_library(tmp_path, compiler=compiler(tmp_path / "cc", script))


def test_no_compiler_no_folder_and_no_library_are_told(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailable, match="no C compiler"):
        build_library(tmp_path, compiler="no-such-compiler")
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailable, match="cannot compile into"):
        build_library(tmp_path / "file", compiler=compiler(tmp_path / "cc", "exit 0"))
    with pytest.raises(KernelsUnavailable, match="cannot load"):
        CpuKernels(tmp_path / "file", threads=1)


def test_an_engine_without_kernels_serves_with_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_random_checkpoint(tmp_path)
    names = {}
    before = torch.get_num_threads()
    for case, path, choice in (("none", "", "auto"), ("torch", None, "torch"), ("own", None, "auto")):
        with monkeypatch.context() as patch:
            if path is not None:
                patch.setenv("PATH", path)
            config = EngineConfig(model=str(tmp_path), device="cpu", kv_cache_bytes=2 << 20, kernels=choice)  # type: ignore[arg-type]
            built = build_engine(config)
        assert built.memory is not None
        built.memory.close()
        names[case] = built.numerics_class
    torch.set_num_threads(before)
    assert names["none"] == names["torch"] != names["own"]
    assert "kernels=torch-" in names["torch"] and "kernels=c-" in names["own"]
    assert "no C compiler" in caplog.text
