"""Negates, one at a time, every comparison that guards an epoch, incarnation, attempt, position, checksum or owner.

    python tests/cluster/sim/negate.py [--seeds 300] [--jobs 2] [--only dispatch]

Each mutant is the real module with one comparison turned round, loaded in place of it; seeds run until one has a
violation. A survivor is a hole in the simulation, or changes nothing: those are named with the reason in EQUIVALENT.
Prints a table; exit code 1 if a mutant survived that is not named there.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    "cluster.worker.decode",
    "cluster.worker.giving_away",
    "cluster.worker.machine",
    "cluster.worker.prefill",
    "cluster.worker.pull",
    "cluster.worker.reservation",
    "cluster.worker.role",
    "cluster.worker.served_call",
    "cluster.worker.source_call",
    "cluster.router.breakers",
    "cluster.router.choosing",
    "cluster.router.dispatch",
    "cluster.router.fleet",
    "cluster.router.recovery",
    "cluster.router.tracked",
    "cluster.transfer.connector",
    "engine.kv.block_manager",
    "engine.kv.prefix_cache",
    "engine.scheduler.landing",
    "engine.scheduler.pulls",
    "engine.scheduler.seats",
    "engine.scheduler.served",
)
WORDS = re.compile(
    r"epoch|incarnation|attempt|position|checksum|link_id|call_id|request\.worker_id !=|r\.worker_id =="
    r"|_quarantined|is not reservation|landing is|_num_refs|_state\[|\.state\(|_of\b"
)
SEED_LIMIT_S = 30

# (module, comparison) -> why turning it round changes nothing that a client, a block or an epoch could show
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "cluster.worker.pull",
        "source.incarnation in self._remote_only",
    ): "which transports are offered: every piece comes over gRPC then, which is slower",
    (
        "cluster.router.choosing",
        "decision.attempt == 1",
    ): "which predictions are compared with what came: figures for people",
    (
        "cluster.router.choosing",
        "decision.attempt == failed.attempt",
    ): "which decision's explanation names the source that failed: words for people",
    (
        "cluster.router.dispatch",
        "before.info.incarnation != info.incarnation",
    ): "forgets what the old incarnation's cache held and its breakers: hints, corrected by each first reply",
    (
        "cluster.router.dispatch",
        "request.attempt == entry.attempt",
    ): "whether a request's history names the source that failed: words for people",
    (
        "cluster.router.dispatch",
        "old.info.incarnation != info.incarnation",
    ): "only where a Welcome comes while the link still counts as up; both shells say on_worker_down first",
    (
        "cluster.router.breakers",
        'self.state(now, decode, source) in ("open", "trying")',
    ): "which sources are preferred",
    (
        "cluster.router.breakers",
        "incarnation in pair",
    ): "breakers that are forgotten with an incarnation: which sources are preferred",
    (
        "engine.scheduler.pulls",
        "self._blocks.state(seat.block_ids[i]) is BlockState.READY",
    ): "blocks committed beyond the valid prefix, which our receiver never has; turned round, empty blocks are traded",
}

_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One comparison of one module; `index` counts the module's comparisons."""

    module: str
    index: int
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a mutant. `seed` None: it survived."""

    site: Site
    seed: int | None
    what: str
    seconds: float


def source_of(module: str) -> Path:
    """Its file."""
    return ROOT / (module.replace(".", "/") + ".py")


def _compares(tree: ast.Module) -> list[ast.Compare]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]


def sites() -> list[Site]:
    """Every comparison whose words are of WORDS, but those that only word a message."""
    found = []
    for module in MODULES:
        text = source_of(module).read_text()
        for index, node in enumerate(_compares(ast.parse(text))):
            segment = " ".join((ast.get_source_segment(text, node) or "").split())
            if WORDS.search(segment):
                found.append(Site(module=module, index=index, line=node.lineno, text=segment))
    return found


class _Loader(importlib.abc.Loader):
    """Loads a module with one comparison negated."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The usual one."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Compile the mutant."""
        path = source_of(self._site.module)
        tree = ast.parse(path.read_text())
        node = _compares(tree)[self._site.index]
        if len(node.ops) == 1:
            node.ops = [_OPPOSITE[type(node.ops[0])]()]
        else:
            _replace(tree, node, ast.copy_location(ast.UnaryOp(op=ast.Not(), operand=node), node))
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, site: Site) -> None:
        self._site = site

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Ours for the one module."""
        return importlib.util.spec_from_loader(name, _Loader(self._site)) if name == self._site.module else None


def _replace(tree: ast.Module, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(item is old for item in value):
                setattr(parent, name, [new if item is old else item for item in value])


def _too_long(*_: Any) -> None:
    raise TimeoutError("it hangs")


def judge(task: tuple[Site, int]) -> Verdict:
    """Run seeds against one mutant until one is bad. To be called in a process of its own: it reloads the packages."""
    site, num_seeds = task
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_long)
    for name in [name for name in sys.modules if name.split(".")[0] in ("cluster", "engine")]:
        del sys.modules[name]
    finder = _Finder(site)
    sys.meta_path.insert(0, finder)
    started = time.perf_counter()
    try:
        run_seed = importlib.import_module("cluster.sim.scenario").run_seed
        for seed in range(num_seeds):
            signal.alarm(SEED_LIMIT_S)
            violations = run_seed(seed).violations
            signal.alarm(0)
            if violations:
                return Verdict(site=site, seed=seed, what=violations[0], seconds=time.perf_counter() - started)
    except Exception as error:
        return Verdict(site=site, seed=0, what=f"{type(error).__name__}: {error}", seconds=0.0)
    finally:
        signal.alarm(0)
        sys.meta_path.remove(finder)
    return Verdict(site=site, seed=None, what="", seconds=time.perf_counter() - started)


def reason(site: Site) -> str | None:
    """Why this mutant is equivalent, if it is named so."""
    return EQUIVALENT.get((site.module, site.text))


def main(arguments: Sequence[str]) -> int:
    """Judge every site. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="Part of a module's name.")
    options = parser.parse_args(arguments)
    chosen = [site for site in sites() if options.only in site.module]
    tasks = [(site, options.seeds) for site in chosen if reason(site) is None]
    survivors = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for verdict in pool.imap_unordered(judge, tasks):
            site = verdict.site
            where = f"{site.module}:{site.line}"
            outcome = "SURVIVED" if verdict.seed is None else f"seed {verdict.seed}"
            print(f"{outcome:9} {where:32} {site.text[:80]:80} {verdict.what[:90]}", flush=True)
            if verdict.seed is None:
                survivors.append(site)
    for site in chosen:
        if (why := reason(site)) is not None:
            print(f"{'no change':9} {f'{site.module}:{site.line}':32} {site.text[:80]:80} {why}")
    print(f"{len(chosen)} comparisons, {len(tasks) - len(survivors)} caught, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
