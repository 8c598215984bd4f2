"""HTTP to text through real processes: a router, a prefill and a decode worker with the exact fake, a registry."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from cluster.registry.registry import RegistryServer
from cluster.spec import FakeSpec, RouterSpec, WorkerSpec
from cluster.worker.rank import fake_config
from engine.config import EngineConfig
from engine.request import SamplingParams
from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer

MODEL = "ernie-fake"
FAKE = FakeSpec(vocab_size=272, num_blocks=1024, max_model_len=4096, fixed_ms=2.0, ms_per_token=0.02)
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the tide. " * 20}]
STEADY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the deadline is generous, and only there so that a fault ends."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@dataclass
class Cluster:
    folder: Path
    registry: str
    port: int
    fake: FakeSpec
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str, module: str, spec: WorkerSpec | RouterSpec) -> None:
        if name in self.processes:
            end(self.processes.pop(name))
        path = self.folder / f"{name}.json"
        path.write_bytes(msgspec.json.encode(spec))
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, str(path)], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )

    def start_worker(self, name: str) -> None:
        role: Any = name.split("-")[0]
        engine = EngineConfig(model="fake", served_model_name=MODEL, role=role, max_num_seqs=8)
        spec = WorkerSpec(worker_id=name, pool="p", role=role, engine=engine, fake=self.fake, registry=self.registry)
        self.start(name, "cluster.worker", spec)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(self.url + "/status").json()
        return answer

    def loads(self) -> list[dict[str, int]]:
        return [worker["load"] for worker in self.status()["workers"] if worker["load"]]

    def referenced(self) -> int:
        return sum(load["referenced_blocks"] for load in self.loads())

    def health(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = httpx.get(self.url + "/health/ready").json()
        except httpx.HTTPError:
            return {"prefill_ready": 0, "decode_ready": 0}
        return answer

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            finally:
                end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


@contextmanager
def registry() -> Iterator[RegistryServer]:
    """A registry's server on a thread of its own."""
    ready, made, stop = threading.Event(), list[Any](), asyncio.Event()

    async def serve() -> None:
        server = RegistryServer()
        await server.start()
        made.extend([server, asyncio.get_running_loop()])
        ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield made[0]
    finally:
        made[1].call_soon_threadsafe(stop.set)
        thread.join(30)


@contextmanager
def start_all(folder: Path, fake: FakeSpec, registry: str, workers: tuple[str, ...]) -> Iterator[Cluster]:
    """The workers and a router of its own, ready; ended afterwards, their logs printed."""
    folder.mkdir(exist_ok=True)
    write_byte_tokenizer(folder)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    made = Cluster(folder, registry, port, fake)
    try:
        for name in workers:
            made.start_worker(name)
        spec = RouterSpec(
            router_id=f"r{port}",
            model_path=str(folder),
            served_model_name=MODEL,
            registry=registry,
            port=port,
            policy="least-loaded",  # names a source always: these tests are about the way over both workers
        )
        made.start("router", "cluster.router", spec)
        eventually(lambda: made.health()["prefill_ready"] * made.health()["decode_ready"] > 0, "never ready")
        yield made
    finally:
        made.stop()
        print("".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in folder.glob("*.log")))


@contextmanager
def running_cluster(folder: Path, fake: FakeSpec) -> Iterator[Cluster]:
    """A registry, a prefill worker, a decode worker and a router."""
    with registry() as server, start_all(folder, fake, server.address, ("prefill-1", "decode-1")) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), FAKE) as made:
        yield made


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def oracle(cluster: Cluster, prompt: list[int], num_tokens: int, **params: Any) -> str:
    tokenizer = Tokenizer.load(cluster.folder)
    model = fake_config(EngineConfig(model="fake"), FAKE).model
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **params)
    return tokenizer.decode(model.oracle(prompt, sampling))


def test_the_sdk_gets_the_oracles_text_over_both_workers(cluster: Cluster, client: openai.OpenAI) -> None:
    prompt = Tokenizer.load(cluster.folder).encode_chat(MESSAGES)
    want = oracle(cluster, prompt, 40)
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=40, **STEADY)
    assert raw.headers["x-neap-path"] == "prefill-decode"
    answer = raw.parse()
    assert answer.choices[0].message.content == want
    assert answer.usage and answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 40
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, stream=True, **STEADY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want


def test_many_at_once_are_all_right(cluster: Cluster, client: openai.OpenAI) -> None:
    prompts = [[30 + (7 * index + position) % 200 for position in range(50 + 9 * index)] for index in range(24)]
    texts: dict[int, str] = {}

    def ask(index: int) -> None:
        stream = client.completions.create(model=MODEL, prompt=prompts[index], max_tokens=30, stream=True, **STEADY)
        texts[index] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[index] for index in range(24)] == [oracle(cluster, prompt, 30) for prompt in prompts]
    eventually(lambda: cluster.referenced() == 0, "blocks stay referenced")


def test_n_choices_and_lists_of_prompts(cluster: Cluster, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[[40] * 40, [50] * 30], n=2, max_tokens=8, **STEADY)
    one, two = oracle(cluster, [40] * 40, 8), oracle(cluster, [50] * 30, 8)
    assert [choice.text for choice in answer.choices] == [one, one, two, two]


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1, 0.4])
def test_a_client_that_leaves_at_any_stage_leaves_no_block_behind(cluster: Cluster, delay_s: float) -> None:
    body = {
        "model": MODEL,
        "prompt": [60 + int(delay_s * 100)] * 3000,
        "max_tokens": 500,
        "ignore_eos": True,
        "stream": True,
    }
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
    with socket.create_connection(("127.0.0.1", cluster.port)) as connection:
        connection.sendall(head + data)
        time.sleep(delay_s)

    def idle() -> bool:
        requests = cluster.status()["requests"]
        busy = sum(load["running"] + load["waiting"] + load["served"] for load in cluster.loads())
        return requests["queued"] + requests["running"] + busy + cluster.referenced() == 0

    time.sleep(0.5)  # the request may still be on its way
    eventually(idle, "something of the request is left")


def test_a_deadline_and_a_prompt_too_long_are_4xx(cluster: Cluster, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=MODEL, prompt=[44] * 3900, extra_headers={"x-neap-timeout-ms": "10"})
    assert (caught.value.status_code, caught.value.code) == (408, "deadline_exceeded")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[44] * 5000)
    assert refused.value.code == "context_length_exceeded"


def test_without_its_prefill_worker_the_decode_worker_prefills(cluster: Cluster, client: openai.OpenAI) -> None:
    prompt = [70] * 200
    cluster.processes["prefill-1"].kill()
    eventually(lambda: cluster.health()["prefill_ready"] == 0, "the loss was not noticed")
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=prompt, max_tokens=20, **STEADY)
    assert raw.headers["x-neap-path"] == "decode-only"
    assert raw.parse().choices[0].text == oracle(cluster, prompt, 20)
    cluster.start_worker("prefill-1")
    eventually(lambda: cluster.health()["prefill_ready"] == 1, "the new prefill worker was not found")
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=[71] * 200, max_tokens=20, **STEADY)
    assert raw.headers["x-neap-path"] == "prefill-decode"
    assert raw.parse().choices[0].text == oracle(cluster, [71] * 200, 20)


def test_a_stream_outlives_its_only_decode_worker(cluster: Cluster, client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=[80] * 50, max_tokens=1500, stream=True, **STEADY)
    text = next(iter(stream)).choices[0].text
    cluster.processes["decode-1"].kill()
    eventually(lambda: cluster.health()["decode_ready"] == 0, "the loss was not noticed")
    assert client.models.list().data == []
    with pytest.raises(openai.APIStatusError) as unready:
        client.completions.create(model=MODEL, prompt=[80] * 50)
    assert unready.value.code == "model_not_ready"
    cluster.start_worker("decode-1")
    eventually(lambda: cluster.health()["decode_ready"] == 1, "the new decode worker was not found")
    text += "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text == oracle(cluster, [80] * 50, 1500), "taken over at the position where it was, by the new one"


def test_an_evaluation_tools_request_gets_the_oracles_prompt_logprobs_in_pieces(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    """As lm-eval asks: token ids, echo, logprobs; more tokens than one step reports."""
    prompts = [[30 + (11 * index + position) % 200 for position in range(600)] for index in range(2)]
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=prompts, max_tokens=1, echo=True, logprobs=1, n=2, seed=1234, temperature=0
    )
    assert raw.headers["x-neap-path"] == "decode-only"
    answer = raw.parse()
    model = fake_config(EngineConfig(model="fake"), FAKE).model
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        prompt, logprobs = prompts[choice.index // 2], choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        assert logprobs.token_logprobs[:-1] == [None, *model.prompt_oracle(prompt)]
        assert len(logprobs.top_logprobs) == 601 and logprobs.top_logprobs[0] is None
        assert choice.text == Tokenizer.load(cluster.folder).decode(prompt, skip_special_tokens=False) + (
            oracle(cluster, prompt, 1)
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1200, 4)


def test_sigterm_lets_streams_finish(cluster: Cluster, client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=[90] * 50, max_tokens=300, stream=True, **STEADY)
    text = next(iter(stream)).choices[0].text
    cluster.processes["router"].terminate()
    eventually(lambda: cluster.health().get("stage") == "draining", "it does not drain")
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == oracle(cluster, [90] * 50, 300)
    assert cluster.processes["router"].wait(30) == 0
