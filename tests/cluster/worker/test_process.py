"""A worker's process as its parent sees it: news on stdout, errors in words, exit codes; and its transports."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from cluster.spec import FakeSpec, WorkerSpec
from cluster.types import FetchOpen, SourceRef, Transport
from cluster.worker.identity import describe_ready, starting_info
from cluster.worker.transports import Transports
from engine.config import EngineConfig
from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory
from engine.messages import RankReady

SPEC = WorkerSpec(
    worker_id="decode-1", pool="decode", role="decode", engine=EngineConfig(model="fake"), fake=FakeSpec(num_blocks=8)
)
LAYOUT = KVLayout(num_blocks=8, num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype="uint8")
READY = RankReady(
    kv_path="/proc/1/fd/1",
    kv_nonce=b"n",
    num_blocks=8,
    num_layers=1,
    num_kv_heads=1,
    block_size=16,
    head_dim=8,
    kv_dtype="uint8",
    identity="model",
    numerics_class="class",
    checksum_algorithm="xxh3_64",
    max_model_len=100,
    max_num_seqs=4,
    vocab_size=32,
    eos_token_ids=(2,),
)


@contextmanager
def running(spec: WorkerSpec, folder: Path) -> Iterator[subprocess.Popen[str]]:
    path = folder / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    command = [sys.executable, "-m", "cluster.worker", str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


def news(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    message = json.loads(process.stdout.readline())
    assert isinstance(message, dict)
    return message


def test_it_says_where_it_listens_and_leaves_on_sigterm(tmp_path: Path) -> None:
    with running(SPEC, tmp_path) as process:
        assert news(process)["listening"].startswith("127.0.0.1:")
        process.send_signal(signal.SIGTERM)  # before the rank is even ready
        assert process.wait(60) == 0


def test_a_rank_that_cannot_start_is_told_in_words(tmp_path: Path) -> None:
    with running(msgspec.structs.replace(SPEC, fake=FakeSpec(vocab_size=2)), tmp_path) as process:
        news(process)
        assert "vocabulary" in news(process)["failed"]
        assert process.wait(60) == 1


def test_a_port_in_use_is_told_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with running(msgspec.structs.replace(SPEC, port=port), tmp_path) as process:
            assert str(port) in news(process)["failed"]
            assert process.wait(60) == 1


def test_a_spec_that_is_wrong_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"worker_id": 3}')
    command = [sys.executable, "-m", "cluster.worker", str(tmp_path / "bad.json")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "worker_id" in json.loads(done.stdout)["failed"]


def test_what_a_worker_says_of_itself_comes_from_its_spec_and_its_rank() -> None:
    info = starting_info(SPEC)
    assert (info.worker_id, info.role, info.state, info.model, info.epoch) == (
        "decode-1",
        "decode",
        "starting",
        "fake",
        1,
    )
    assert len(info.incarnation) == 32
    assert info.incarnation != starting_info(SPEC).incarnation
    ready = describe_ready(info, READY, LAYOUT)
    assert (ready.state, ready.identity, ready.max_model_len) == ("starting", "model", 100)
    assert (ready.kv_fingerprint, ready.incarnation) == (LAYOUT.fingerprint(), info.incarnation)


def call(*transports: Transport) -> FetchOpen:
    return FetchOpen(
        call_id="c",
        request_id="r",
        attempt=1,
        source_incarnation="s",
        receiver_id="d",
        receiver_incarnation="i",
        identity="x",
        kv_fingerprint="y",
        tokens=bytes(64),
        start=0,
        end=16,
        max_compute_tokens=-1,
        remaining_ms=1,
        transports=transports,
    )


def test_local_is_asked_for_only_where_the_source_may_be_on_this_host() -> None:
    transports = Transports(("grpc", "local"))
    memory = KVMemory.create(LAYOUT)
    transports.open(memory)
    me = replace(starting_info(SPEC), address="10.0.0.1:5")
    near = SourceRef(worker_id="p", incarnation="s", address="10.0.0.1:6")
    far = replace(near, address="10.0.0.2:6")
    assert transports.asked(call("local", "grpc"), near, me).transports == ("local", "grpc")
    assert transports.asked(call("local", "grpc"), far, me).transports == ("grpc",)
    assert transports.asked(call("grpc"), near, me).transports == ("grpc",)
    transports.close()


def test_a_worker_speaks_only_the_transports_of_its_spec() -> None:
    transports = Transports(("grpc",))
    memory = KVMemory.create(LAYOUT)
    transports.open(memory)
    assert transports.local_memory(READY) is None
    assert transports.offered(call("local", "grpc")).transports == ("grpc",)
    transports.close()
    with pytest.raises(ValueError, match="carrier-pigeon"):
        Transports(("grpc", "carrier-pigeon"))


def test_kv_on_a_device_is_out_of_reach() -> None:
    transports = Transports(("local", "grpc"))
    transports.open(None)
    assert not transports.can_serve
    assert transports.local_memory(READY) is None
    assert transports.offered(call("local", "grpc")).transports == ()
