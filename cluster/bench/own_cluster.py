"""A cluster of the benchmark's own, `neap serve` as plain processes, and what CPU time its processes use."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from cluster.bench.load import Target
from cluster.bench.words import VOCAB_SIZE, write_checkpoint
from cluster.spec import FakeSpec
from cluster.worker.lifeline import die_with_parent

MODEL = "fake"


@dataclass(frozen=True, kw_only=True)
class OwnCluster:
    """A running cluster. `pid` is that of `neap serve`; everything else of it is below."""

    target: Target
    pid: int

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds (user and system) since start by kind of process: router, worker, rank, control."""
        seconds: dict[str, float] = {}
        try:
            root = psutil.Process(self.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return {}
        for process in processes:
            try:
                times, kind = process.cpu_times(), _kind(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
        return seconds


def _kind(command: Sequence[str]) -> str:
    for module, kind in (("cluster.router", "router"), ("cluster.worker.rank", "rank"), ("cluster.worker", "worker")):
        if module in command:
            return kind
    return "control"


@contextmanager
def own_cluster(arguments: Sequence[str]) -> Iterator[OwnCluster]:
    """`neap serve` on a free port while the context lasts. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "neap", "serve", "--backend", "process", "--port", "0", *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread yet; a bench that is killed leaves no cluster)
    ) as process:
        assert process.stdout is not None, "stdout is a pipe"
        try:
            url = None
            said: list[str] = []
            for line in process.stdout:
                said.append(line.rstrip())
                url = re.search(r"endpoint\s+http://(\S+):([0-9]+)/v1", line) or url
                if line.startswith("curl "):
                    break
            if url is None:
                raise RuntimeError("neap serve ended: " + "\n".join(said[-5:]))
            yield OwnCluster(target=Target(host=url[1].strip("[]"), port=int(url[2])), pid=process.pid)
        finally:
            process.terminate()
            process.communicate()


@contextmanager
def fake_cluster(fake: FakeSpec, *, prefill: int, decode: int, max_num_seqs: int) -> Iterator[tuple[OwnCluster, Path]]:
    """A router over exact fakes that generate plain words, and the checkpoint folder that holds their tokenizer."""
    with tempfile.TemporaryDirectory(prefix="neap-bench-") as name:
        folder = Path(name) / MODEL
        folder.mkdir()
        write_checkpoint(folder)
        pools = [{"role": "prefill", "workers": prefill}] if prefill else []
        config = {
            "model": str(folder),
            "served_model_name": MODEL,
            "engine": {"max_num_seqs": max_num_seqs},
            "pools": [*pools, {"role": "decode", "workers": decode}],
            "router": {"max_queue": 4096, "max_running": 4096},
            "roles": {"auto": False},  # what is measured is this very split
            "fake": {field: getattr(fake, field) for field in FakeSpec.__struct_fields__},
        }
        file = Path(name) / "cluster.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with own_cluster(["--config", str(file)]) as cluster:
            yield cluster, folder


def fake_spec(*, step_ms: float, token_ms: float) -> FakeSpec:
    """A fake with room for a few thousand short requests."""
    return FakeSpec(
        vocab_size=VOCAB_SIZE, num_blocks=16384, max_model_len=2048, fixed_ms=step_ms, ms_per_token=token_ms
    )
