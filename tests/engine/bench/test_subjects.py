"""Both engines run the same loads, and a session drives them in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.bench import workload
from engine.bench.child import Answer, Failed, serve
from engine.bench.neap_subject import NeapSubject
from engine.bench.report import as_json, table
from engine.bench.session import BenchError, EngineFigures, run_session
from engine.bench.subject import SubjectSpec, prepare, run
from engine.bench.transformers_subject import TransformersSubject
from engine.bench.workload import MixedRequest
from engine.tiny.random_checkpoint import make_random_checkpoint


class CountingSubject:
    """Answers in numbers that tell what was asked."""

    vocab_size = 320
    versions = {"counting": "1"}

    def __init__(self) -> None:
        self.prefilled: list[tuple[int, ...]] = []
        self.prepared: list[int] = []

    def prefill_s(self, prompt: Sequence[int]) -> float:
        self.prefilled.append(tuple(prompt))
        return 2.0

    def prepare_decode(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prepared.append(len(prompts))

    def decode_rate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> float:
        return float(len(prompts) * num_new_tokens)

    def mixed_rate(self, requests: Sequence[MixedRequest]) -> float:
        return float(len(requests))


def spec(path: Path, engine: str = "neap", **options: bool | int | float | str) -> SubjectSpec:
    return SubjectSpec(
        engine=engine, model=str(path), dtype="float32", threads=1, kv_cache_bytes=32 << 20, options=options
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=1)


def test_no_prompt_is_prefilled_twice() -> None:
    subject = CountingSubject()
    prepare(subject, "prefill_512")
    rates = [run(subject, "prefill_512", repetition) for repetition in range(3)]
    assert rates == [256.0] * 3
    assert len(set(subject.prefilled)) == 4 and all(len(prompt) == 512 for prompt in subject.prefilled)


def test_measures_take_their_size_from_their_name() -> None:
    subject = CountingSubject()
    prepare(subject, "decode_b8")
    assert subject.prepared == [8]
    assert run(subject, "decode_b8", 0) == 8 * workload.NEW_TOKENS
    assert run(subject, "mixed", 0) == workload.MIXED_REQUESTS


@pytest.mark.parametrize("kind", [NeapSubject, TransformersSubject])
def test_an_engine_runs_every_kind_of_load(
    checkpoint: Path, kind: type[NeapSubject] | type[TransformersSubject]
) -> None:
    subject = kind(spec(checkpoint))
    assert subject.vocab_size == 320 and "torch" in subject.versions
    prompts = [workload.prompt(40, seed, 320) for seed in range(3)]
    subject.prepare_decode(prompts)
    assert all(subject.decode_rate(prompts, 5) > 0 for _ in range(2))
    assert subject.prefill_s(prompts[0]) > 0
    assert subject.mixed_rate([MixedRequest(prompt=prompt, num_output_tokens=3) for prompt in prompts]) > 0


def test_a_request_that_does_not_fit_is_told(checkpoint: Path) -> None:
    subject = NeapSubject(spec(checkpoint, max_model_len=128))
    with pytest.raises(ValueError, match="max_model_len 128"):
        subject.prefill_s(workload.prompt(200, 0, 320))


def test_a_session_measures_in_a_process_of_its_own(checkpoint: Path) -> None:
    told: list[str] = []
    saved: list[float] = []
    (figures,) = run_session(
        [spec(checkpoint)],
        {"neap": ["prefill_512"]},
        repetitions=2,
        environment=os.environ,
        tell=told.append,
        save=lambda so_far: saved.append(so_far[0].median("prefill_512")),
    )
    assert saved == [figures.median("prefill_512")]
    assert len(figures.runs["prefill_512"]) == 2 and figures.start_s > 0 and figures.peak_rss_mib > 50
    assert told[0] == "neap: starting" and "run 2/2" in told[-1]


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    answers = BytesIO()
    assert serve(BytesIO(msgspec.json.encode(spec(tmp_path)) + b"\n"), answers) == 1
    answer: Answer = msgspec.json.decode(answers.getvalue(), type=Answer)
    assert isinstance(answer, Failed) and "config.json" in answer.reason


def test_a_child_that_dies_is_told(checkpoint: Path) -> None:
    with pytest.raises(BenchError, match=r"neap: its process ended with 1"):
        run_session(
            [spec(checkpoint)],
            {"neap": []},
            repetitions=1,
            environment={"PYTHONHOME": "/nowhere"},
            tell=print,
            save=print,
        )


def test_a_child_does_not_outlive_its_parent(checkpoint: Path) -> None:
    """Not even where its stdin stays open, as it does for one that is in the middle of a measure."""
    commands, asking = os.pipe()
    start = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-m', 'engine.bench.child'],"
    wait = f" stdin={commands}, stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); input()"
    command = [sys.executable, "-c", start + wait]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[commands]) as process:
        os.write(asking, msgspec.json.encode(spec(checkpoint)) + b"\n")
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
        process.kill()
    assert psutil.wait_procs([child], timeout=60)[1] == []
    os.close(asking)
    os.close(commands)


def figures(engine: str, factor: float) -> EngineFigures:
    runs = {name: [factor, 2 * factor, 3 * factor] for name in workload.RATIO_MEASURES}
    return EngineFigures(engine=engine, versions={}, start_s=1.5, peak_rss_mib=1000.0, runs=runs)


def test_ratios_are_of_the_medians() -> None:
    found = as_json([figures("neap", 30.0), figures("transformers", 10.0)], {"model": "m"})
    assert found["ratios"] == dict.fromkeys(workload.RATIO_MEASURES, 3.0)
    assert found["model"] == "m"
    names, rows = table([figures("neap", 30.0), figures("transformers", 10.0)])
    assert names == ["", *workload.RATIO_MEASURES, "start", "peak RSS"]
    assert rows[0][1] == "60.0 ±50%" and rows[2] == ["ratio", *["3.00x"] * 5, "", ""]


def test_one_engine_alone_has_no_ratios() -> None:
    assert "ratios" not in as_json([figures("neap", 1.0)], {})
