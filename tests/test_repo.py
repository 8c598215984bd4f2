"""The rules of the house that no other tool checks: sizes, forbidden calls, who reads the environment, fresh stubs."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE = re.compile(r"\btorch\.load\(|(?<![\w.])eval\(|(?<![\w.])exec\(|\byaml\.load\(")
UNFINISHED = re.compile(r"\bNotImplementedError\b|\bTODO\b|\bFIXME\b")
ENVIRONMENT_READERS = {"cluster/config/environment.py"}
DISTRIBUTED_USERS = {"engine/parallel.py"}
NO_IDEA = {"utils", "common", "helpers", "misc"}


@functools.cache
def sources() -> tuple[tuple[str, str, ast.Module], ...]:
    """(path from the root, text, syntax tree) of every source file that git would commit; generated stubs excluded."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = [name for name in listed if (ROOT / name).exists() and not name.startswith("cluster/rpc/pb/")]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    return tuple((name, text, ast.parse(text)) for name, text in texts.items())


def product() -> Iterator[tuple[str, str, ast.Module]]:
    """The sources without the tests."""
    return (source for source in sources() if not source[0].startswith("tests/"))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def names_environment(node: ast.Attribute) -> bool:
    return (
        isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in {"environ", "environb", "getenv", "putenv"}
    )


def test_files_and_functions_are_small() -> None:
    too_large = []
    for name, text, tree in sources():
        if (lines := text.count("\n")) >= MAX_FILE_LINES:
            too_large.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= MAX_FUNCTION_LINES:
                    too_large.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not too_large, "\n".join(too_large)


def test_product_code_is_finished_and_loads_nothing_unsafe() -> None:
    found = []
    for name, text, tree in product():
        found += [f"{name}:{line} imports {what}" for line, what in imports(tree) if what.split(".")[0] in PICKLES]
        for number, line in enumerate(text.splitlines(), 1):
            if UNSAFE.search(line) or UNFINISHED.search(line):
                found.append(f"{name}:{number} {line.strip()}")
    assert not found, "\n".join(found)


def test_nothing_is_swallowed() -> None:
    found = []
    for name, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and [type(s) for s in node.body] == [ast.Pass]:
                found.append(f"{name}:{node.lineno} except ...: pass")
    assert not found, "\n".join(found)


def test_comments_are_ascii() -> None:
    found = []
    for name, text, _ in sources():
        if not text.isascii():
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            found += [
                f"{name}:{t.start[0]} {t.string}"
                for t in tokens
                if t.type == tokenize.COMMENT and not t.string.isascii()
            ]
    assert not found, "\n".join(found)


def test_only_the_config_reads_the_environment() -> None:
    found = []
    for name, _, tree in product():
        if name in ENVIRONMENT_READERS:
            continue
        found += [f"{name}:{n.lineno}" for n in ast.walk(tree) if isinstance(n, ast.Attribute) and names_environment(n)]
        found += [f"{name}:{line}" for line, what in imports(tree) if what in {"os.environ", "os.getenv"}]
    assert not found, "\n".join(found)


def test_torch_distributed_stays_in_one_file() -> None:
    found = []
    for name, _, tree in product():
        if name not in DISTRIBUTED_USERS:
            found += [f"{name}:{line}" for line, what in imports(tree) if what.startswith("torch.distributed")]
    assert not found, "\n".join(found)


def test_folders_name_an_idea_and_proto_is_no_package() -> None:
    names = {part for name, _, _ in sources() for part in Path(name).with_suffix("").parts}
    assert not names & NO_IDEA
    assert not (ROOT / "proto" / "__init__.py").exists(), "it would hide the package proto that Ray brings"


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    pins = [ln for ln in (ROOT / "constraints.txt").read_text().splitlines() if ln and not ln.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact and portable versions only"

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>!~; ]", name)[0]).lower()

    assert {plain(w) for w in wanted} <= {plain(p) for p in pins}


def test_generated_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto").glob("*.proto"))
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Icluster/rpc/pb=proto", *outs]
        + [f"cluster/rpc/pb/{p.name}" for p in protos],
        cwd=ROOT,
        check=True,
    )
    fresh = {p.name: p.read_text() for p in (tmp_path / "cluster/rpc/pb").iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "cluster/rpc/pb").glob("*_pb2*")}
    assert fresh.keys() == committed.keys(), "run make proto and commit the stubs"
    assert [n for n in fresh if fresh[n] != committed[n]] == [], "run make proto and commit the stubs"
