"""The public face is light, complete, and not to be mistaken for another package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import neap

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False, cwd="/")


def test_importing_neap_loads_nothing_heavy() -> None:
    code = "import neap; print([n for n in ('torch', 'ray', 'fastapi', 'numpy', 'engine') if n in sys.modules])"
    done = run_python(code, ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_sampling_params_come_without_torch() -> None:
    code = "from neap import SamplingParams; print(SamplingParams(top_k=3).top_k, 'torch' in sys.modules)"
    done = run_python(code, ROOT)
    assert done.stdout.strip() == "3 False", done.stderr


def test_every_public_name_is_there() -> None:
    for name in neap.__all__:
        assert getattr(neap, name) is not None
        assert name in dir(neap)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = neap.nonsense


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert neap.__version__ == project["version"]


@pytest.mark.parametrize("name", ["engine", "cluster"])
@pytest.mark.parametrize("with_init", [True, False])
def test_a_foreign_package_is_refused(tmp_path: Path, name: str, with_init: bool) -> None:
    (tmp_path / name).mkdir()
    if with_init:
        (tmp_path / name / "__init__.py").write_text("")
    # A namespace folder never wins against a real package, so there it must be the only one.
    own = tmp_path / "own"
    own.mkdir()
    (own / "neap.py").write_text((ROOT / "neap.py").read_text())
    done = run_python("import neap", tmp_path, own) if not with_init else run_python("import neap", tmp_path, ROOT)
    assert done.returncode != 0
    assert "ImportError: neap needs its own package" in done.stderr and "virtual environment" in done.stderr


def test_a_foreign_package_that_is_already_imported_is_refused() -> None:
    code = "import types; sys.modules['cluster'] = types.ModuleType('cluster')\nimport neap"
    done = run_python(code, ROOT)
    assert "neap needs its own package 'cluster'" in done.stderr


def test_main_is_the_command_line() -> None:
    code = "import types; sys.modules['cluster.cli'] = types.SimpleNamespace(main=lambda: print('ran'))\n"
    done = run_python(code + "import neap; neap.main()", ROOT)
    assert done.stdout.strip() == "ran", done.stderr
