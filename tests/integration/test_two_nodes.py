"""A Ray cluster that runs already, with two nodes on 127.0.0.2 and 127.0.0.3: `neap serve` puts P and D apart on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.test_serve import END_S, answers_the_openai_sdk, serving

# One CPU a node, so that a node takes one worker. It ends when its stdin does.
CLUSTER = """
import sys
from cluster.config.environment import prepare_ray
prepare_ray()
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80 << 20}
head = {**small, "node_ip_address": "127.0.0.2", "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(node_ip_address="127.0.0.3", **small)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: Ray's sockets lie below it, and a socket's name has 107 bytes at most."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def ray_address(home: Path) -> Iterator[str]:
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
    with (home / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().decode().strip()
        assert address, (home / "ray.log").read_text()[-3000:]
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        process.wait(END_S)
        process.stdout.close()
        for left in psutil.wait_procs(family, timeout=END_S)[1]:
            left.kill()


@pytest.mark.timeout(300)
def test_prefill_and_decode_lie_on_different_nodes_of_a_running_ray(ray_address: str, home: Path) -> None:
    arguments = ("--ray-address", ray_address, "--worker-host", "auto", "--require-prefill")
    with serving(home, *arguments) as server:
        server.wait_until_ready()
        workers = server.status()["workers"]
        hosts = {worker["worker_id"]: worker["address"].rpartition(":")[0] for worker in workers}
        assert set(hosts) == {"prefill-0", "decode-0"} and set(hosts.values()) == {"127.0.0.2", "127.0.0.3"}
        answers_the_openai_sdk(server)
        assert server.end(signal.SIGINT) == 0
