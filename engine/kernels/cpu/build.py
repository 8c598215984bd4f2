"""Compiles the C kernels for this machine, once: the library lies in a cache folder under a name that says what it is.

    <cache>/kernels/neap-cpu-<hash of sources, compiler, flags and processor>.so

Compiling takes a few seconds. Two processes that start at once both compile; each renames its own file into place.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
# No contraction: a fused multiply-add happens where it is written, so bits do not depend on the compiler's choices.
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_TIMEOUT_S = 120.0


class KernelsUnavailable(Exception):
    """The kernels cannot run here; the message says why. The torch path serves instead."""


def build_library(cache_dir: Path, *, compiler: str = "", extra_flags: tuple[str, ...] = ()) -> Path:
    """The compiled library, from the cache if it is there.

    `compiler`: a path or name; empty takes the machine's. Raises KernelsUnavailable: no compiler, no kernels for this
    processor, or a folder that cannot be written.
    """
    found = shutil.which(compiler) if compiler else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise KernelsUnavailable(f"no C compiler found ({compiler or ', '.join(_COMPILERS)})")
    sources = sorted(_FOLDER.glob("*.[ch]"))
    flags = (*_FLAGS, *extra_flags)
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in sources), repr(flags).encode(), _version(found), _processor()):
        digest.update(hashlib.sha256(part).digest())
    library = cache_dir / "kernels" / f"neap-cpu-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        _compile(found, flags, [path for path in sources if path.suffix == ".c"], library)
    return library


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *flags, *map(str, sources), "-lm", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                raise KernelsUnavailable(f"{compiler} failed: {_first_error(done.stderr)}")
            os.replace(made, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"cannot compile into {library.parent}: {error}") from error


def _first_error(text: str) -> str:
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{compiler} does not run: {error}") from error


def _processor() -> bytes:
    """What -march=native looks at: a cache folder may be shared by machines."""
    path = Path("/proc/cpuinfo")
    wanted = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))]).encode()
