"""The offline API on a tiny random model: order, choices, stops, seeds, refusals, interrupts."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from engine.fake_engine import FakeConfig, FakeModel, build_fake_engine
from engine.llm import LLM, RequestOutput
from engine.llm_jobs import Job, run_jobs
from engine.messages import Add, StepEvents
from engine.request import FinishReason, SamplingParams
from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_bytes": 8 << 20}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_random_checkpoint(folder, model_type="ernie4_5_moe", vocab_size=write_byte_tokenizer(folder))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, **OPTIONS) as llm:
        yield llm


def assert_idle(llm: LLM) -> None:
    load = llm._engine.core.load()
    assert not llm._engine.core.has_work
    assert (load.num_running, load.num_waiting, load.num_referenced_blocks) == (0, 0, 0)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["Hello", "你好、世界", "a" * 60, "🎉", "x", "last one"]
    params = [replace(GREEDY, max_tokens=4 + index) for index in range(len(prompts))]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs.token_ids) for output in outputs] == [4, 5, 6, 7, 8, 9]
    for prompt, output, one in zip(prompts, outputs, params, strict=True):
        assert list(output.prompt_token_ids) == llm.tokenizer.encode(prompt)
        assert output.outputs.text == llm.tokenizer.decode(output.outputs.token_ids)
        assert output.outputs.finish_reason == "length"
        alone = llm.generate(prompt, one)
        assert alone[0].outputs == output.outputs
    assert_idle(llm)


def test_prompts_may_be_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    mixed: list[str | list[int]] = [ids, "Hello"]
    one, two = llm.generate(mixed, GREEDY)
    assert one == two and llm.generate(ids, GREEDY) == [one]
    assert llm.generate([], GREEDY) == []


def test_choices_differ_and_the_first_is_outputs(llm: LLM) -> None:
    (output,) = llm.generate("Hello", replace(SAMPLED, n=4, seed=7))
    assert [choice.index for choice in output.choices] == [0, 1, 2, 3] and output.outputs is output.choices[0]
    assert len({choice.token_ids for choice in output.choices}) == 4
    assert output == llm.generate("Hello", replace(SAMPLED, n=4, seed=7))[0]
    assert output.outputs.token_ids == llm.generate("Hello", replace(SAMPLED, seed=7))[0].outputs.token_ids
    assert_idle(llm)


def test_missing_seeds_come_from_the_llms_seed(checkpoint: Path) -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        with LLM(checkpoint, seed=seed, **OPTIONS) as llm:
            return [output.outputs.token_ids for output in llm.generate(["Hello"] * 3, SAMPLED)]

    first = run(1)
    assert len(set(first)) == 3
    assert run(1) == first != run(2)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate("Hello", replace(SAMPLED, seed=3, max_tokens=40))
    text = whole.outputs.text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (output,) = llm.generate("Hello", replace(SAMPLED, seed=3, max_tokens=40, stop=(stop, "never seen")))
    assert output.outputs.text == text[: text.index(stop)]
    assert output.outputs.finish_reason == "stop"
    assert output.outputs.token_ids == whole.outputs.token_ids[: len(output.outputs.token_ids)]
    assert len(output.outputs.token_ids) < 40
    assert_idle(llm)


def test_a_stop_token_counts_but_is_no_text(llm: LLM) -> None:
    (whole,) = llm.generate("Hello", GREEDY)
    stop_id = whole.outputs.token_ids[5]
    first = whole.outputs.token_ids.index(stop_id)
    params = replace(GREEDY, stop_token_ids=(stop_id,), skip_special_tokens=False)
    (output,) = llm.generate("Hello", params)
    assert output.outputs.token_ids == whole.outputs.token_ids[: first + 1]
    assert output.outputs.finish_reason == "stop"
    assert output.outputs.text == llm.tokenizer.decode(whole.outputs.token_ids[:first], skip_special_tokens=False)


def test_both_ends_of_sentence_stop(llm: LLM, checkpoint: Path) -> None:
    for name in ("</s>", "<|end_of_sentence|>"):
        (token,) = llm.tokenizer.encode(name)
        (output,) = llm.generate("Hello", replace(GREEDY, ignore_eos=False, logit_bias={token: 100.0}))
        assert output.outputs.token_ids == (token,) and output.outputs.finish_reason == "stop"
        assert output.outputs.text == ""
        bias = {token: 100.0}
        (held,) = llm.generate("Hello", replace(GREEDY, ignore_eos=False, logit_bias=bias, min_tokens=3))
        assert len(held.outputs.token_ids) == 4 and held.outputs.token_ids[3] == token
        (ignored,) = llm.generate("Hello", replace(GREEDY, logit_bias=bias))
        assert ignored.outputs.token_ids == (token,) * 12


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    (output,) = llm.generate("Hello", replace(GREEDY, logprobs=3))
    logprobs = output.outputs.logprobs
    assert logprobs is not None and len(logprobs) == len(output.outputs.token_ids)
    for token, entry in zip(output.outputs.token_ids, logprobs, strict=True):
        assert entry.top_ids[0] == token and entry.logprob == entry.top_logprobs[0] < 0
        assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True) and len(entry.top_ids) == 3
    assert llm.generate("Hello", GREEDY)[0].outputs.logprobs is None


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|begin_of_sentence|>User: hi\nAssistant: "
    assert output == llm.generate(output.prompt, GREEDY)[0]
    assert llm.chat([messages, messages], GREEDY) == [output, output]


def test_the_checkpoint_supplies_defaults(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    defaults = llm.default_sampling_params
    assert (defaults.temperature, defaults.top_p) == (0.8, 0.8)
    assert len(llm.generate("Hello")[0].outputs.token_ids) <= 16
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(ValueError, match=r"generation_config\.json.*temperature"):
        LLM(tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        (["ok", ""], GREEDY, r"prompts\[1\] has no tokens"),
        (["ok", [1, 100000]], GREEDY, r"prompts\[1\]: token ids"),
        (["ok", [-1]], GREEDY, r"prompts\[1\]: token ids"),
        (["ok", "x" * 128], GREEDY, r"prompts\[1\] has 128 tokens"),
        (["ok", 3.5], GREEDY, r"prompts\[1\] must be text"),
        (["ok", ["a"]], GREEDY, r"prompts\[1\] must be text"),
        (["ok", "\ud800"], GREEDY, "surrogate"),
        (b"ok", GREEDY, "prompts must be"),
        (["ok", "ok"], [GREEDY], "2 prompts need 2"),
        ("ok", replace(GREEDY, logit_bias={100000: 1.0}), "logit_bias"),
        ("ok", replace(GREEDY, stop_token_ids=(100000,)), "stop_token_ids"),
    ],
)
def test_anything_wrong_is_refused_before_anything_runs(llm: LLM, prompts: Any, params: Any, named: str) -> None:
    before = llm._engine.core.load()
    with pytest.raises(ValueError, match=named):
        llm.generate(prompts, params)
    assert llm._engine.core.load() == before and not llm._engine.core.has_work


def test_wrong_messages_are_refused(llm: LLM) -> None:
    for messages in ([], [{"role": "king", "content": "x"}], [[{"role": "user"}]]):
        with pytest.raises(ValueError, match="messages"):
            llm.chat(messages, GREEDY)


def test_options_and_paths_are_checked(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option 'max_len'.*max_model_len"):
        LLM(checkpoint, max_len=3)
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM(checkpoint, max_num_seqs=0)
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)


def test_a_closed_llm_says_so(checkpoint: Path) -> None:
    llm = LLM(checkpoint, **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.generate("Hello", GREEDY)


def test_an_interrupt_aborts_and_leaves_the_engine_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core, steps = llm._engine.core, 0
    expected = llm.generate(["Hello", "again"], GREEDY)
    step = core.step

    def interrupted() -> StepEvents | None:
        nonlocal steps
        steps += 1
        if steps == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(core, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 8, replace(SAMPLED, max_tokens=60, n=2))
    assert steps < 20 and signal.getsignal(signal.SIGINT) is before
    assert_idle(llm)
    assert llm.generate(["Hello", "again"], GREEDY) == expected


@pytest.mark.parametrize("steps_in_flight", [0, 1])
def test_jobs_on_the_exact_fake_give_the_oracles_tokens(checkpoint: Path, steps_in_flight: Literal[0, 1]) -> None:
    config = FakeConfig(num_blocks=24, model=FakeModel(vocab_size=288, stop_probability=0.02))
    config = replace(config, engine=replace(config.engine, steps_in_flight=steps_in_flight, max_num_seqs=5))
    core, tokenizer = build_fake_engine(config), Tokenizer.load(checkpoint)
    params = SamplingParams(temperature=1.0, max_tokens=40, n=3)
    prompts = [list(range(3, 20 + 7 * index)) for index in range(9)]
    jobs = [
        [
            Job(
                Add(
                    request_id=f"{index}-{choice}",
                    prompt=b"".join(token.to_bytes(4, "little") for token in prompt),
                    params=params,
                    seed=index,
                    choice=choice,
                ),
                tokenizer,
            )
            for choice in range(3)
        ]
        for index, prompt in enumerate(prompts)
    ]
    run_jobs(core, jobs)
    for index, (prompt, choices) in enumerate(zip(prompts, jobs, strict=True)):
        for choice, job in enumerate(choices):
            expected = config.model.oracle(prompt, params, seed=index, choice=choice, token_words=_token_words(config))
            assert list(job.output().token_ids) == expected
            assert job.output().finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert core.load().num_referenced_blocks == 0 and not core.has_work
    assert core.load().prefix_cache_hits > 0


def test_an_engine_that_gives_a_request_up_is_an_error(checkpoint: Path) -> None:
    core, tokenizer = build_fake_engine(FakeConfig(num_blocks=3)), Tokenizer.load(checkpoint)
    job = Job(Add(request_id="a", prompt=bytes(4 * 200), params=GREEDY, seed=0), tokenizer)
    with pytest.raises(RuntimeError, match="kv_capacity_exceeded"):
        run_jobs(core, [[job]])
    assert not core.has_work


def _token_words(config: FakeConfig) -> int:
    return config.layout.token_bytes // 8


def test_outputs_are_plain_values(llm: LLM) -> None:
    (output,) = llm.generate("Hello", GREEDY)
    assert isinstance(output, RequestOutput)
    with pytest.raises(AttributeError):
        output.prompt = "other"  # type: ignore[misc]
