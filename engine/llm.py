"""The offline API: an engine in this process, for scripts and notebooks.

    from neap import LLM, SamplingParams
    llm = LLM("path/to/checkpoint", max_model_len=4096)
    for output in llm.generate(["Hello", "你好"], SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128)):
        print(output.prompt, output.outputs.text)

Life cycle of a call: all is checked and tokenised -> Adds -> steps until all have ended -> results in input order.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, cast

import numpy as np

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.engine import build_engine
from engine.messages import Abort, Add, NewTokens
from engine.models.hub import model_folder
from engine.request import SEED_BITS, FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.generation_defaults import read_generation_defaults
from engine.text.stop_strings import StopStrings
from engine.text.tokenizer import Tokenizer
from engine.tiny.random_checkpoint import default_checkpoint

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. `token_ids` includes the token that stopped it; `text` includes neither that nor a stop string.

    `logprobs` has one entry per token where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt and its answers: `outputs` is the first choice, `choices` are all n of them.

    `prompt` is the text given; for token ids and conversations, what the ids decode to.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    outputs: CompletionOutput
    choices: tuple[CompletionOutput, ...]


class LLM:
    """An engine with its tokenizer. Not thread-safe. Usable as a context manager; `close` frees its memory.

    `model` is a checkpoint's folder or a Hugging Face id (`revision`: its branch, tag or commit); without it a small
    random checkpoint is made under ~/.cache/neap: it answers noise, but everything works.
    `options` are the fields of EngineConfig (max_model_len, dtype, device, max_num_seqs, threads, kv_cache_bytes, ...).
    `seed` is where the seeds of requests without one come from. Raises ValueError for wrong options or checkpoints.
    """

    def __init__(self, model: str | Path | None = None, *, revision: str = "", seed: int = 0, **options: Any) -> None:
        given = model_folder(str(model), revision=revision) if model is not None else None
        path = given or default_checkpoint(Path.home() / ".cache" / "neap")
        known = {field.name for field in dataclasses.fields(EngineConfig)} - {"model"}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown option {unknown[0]!r}; the options are: {', '.join(sorted(known))}")
        self.tokenizer = Tokenizer.load(path)
        self.default_sampling_params = read_generation_defaults(path)
        self._engine = build_engine(EngineConfig(model=str(path), **options))
        self._seeds = random.Random(seed)
        self._vocab_size = self._engine.model_config.vocab_size
        # The engine stops at the ids that the configuration names; ERNIE's other end of sentence stops too.
        known_eos = self._engine.model_config.eos_token_ids
        self._more_eos = tuple(token for token in self.tokenizer.eos_token_ids if token not in known_eos)
        self._num_calls = 0
        memory = self._engine.memory
        self._free = weakref.finalize(self, memory.close if memory is not None else _nothing)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts (text or token ids), results in the same order.

        One SamplingParams for all, one for each, or None for the checkpoint's defaults. Raises ValueError for anything
        wrong with any of them before anything runs. Ctrl-C aborts what runs and leaves the engine usable.
        """
        listed = _listed_prompts(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        token_ids = [self._encode(prompt, f"prompts[{index}]") for index, prompt in enumerate(listed)]
        return self._run(texts, token_ids, sampling_params)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the checkpoint's chat template. Otherwise as `generate`."""
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[object] = messages if many else [messages]
        token_ids = []
        for index, conversation in enumerate(conversations):
            where = f"conversations[{index}]" if many else "messages"
            encoded = self.tokenizer.encode_chat(
                conversation, add_generation_prompt=add_generation_prompt, extra=chat_template_kwargs
            )
            token_ids.append(self._check_ids(encoded, where))
        return self._run([None] * len(token_ids), token_ids, sampling_params)

    def close(self) -> None:
        """Free the KV memory (once; also done when the object is collected). The LLM can't be used afterwards."""
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt, where: str) -> list[int]:
        if isinstance(prompt, str):
            return self._check_ids(self.tokenizer.encode(prompt), where)
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int | np.integer) for token in prompt):
            raise ValueError(f"{where} must be text or a list of token ids, got {type(prompt).__name__}")
        return self._check_ids([int(token) for token in prompt], where)

    def _check_ids(self, token_ids: list[int], where: str) -> list[int]:
        if not token_ids:
            raise ValueError(f"{where} has no tokens")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise ValueError(f"{where}: token ids must be in [0, {self._vocab_size})")
        if len(token_ids) >= self._engine.max_model_len:
            raise ValueError(
                f"{where} has {len(token_ids)} tokens; with max_model_len {self._engine.max_model_len} "
                f"at most {self._engine.max_model_len - 1} leave room for an answer"
            )
        return token_ids

    def _run(
        self,
        texts: Sequence[str | None],
        token_ids: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        if not self._free.alive:
            raise ValueError("this LLM is closed")
        params = [self._complete(one) for one in self._listed_params(sampling_params, len(token_ids))]
        self._num_calls += 1
        jobs = [
            [self._job(f"{self._num_calls}-{index}-{choice}", ids, one, choice) for choice in range(one.n)]
            for index, (ids, one) in enumerate(zip(token_ids, params, strict=True))
        ]
        run_jobs(self._engine.core, jobs)
        return [self._result(text, ids, choices) for text, ids, choices in zip(texts, token_ids, jobs, strict=True)]

    def _listed_params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            return [self.default_sampling_params] * count
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if len(sampling_params) != count:
            raise ValueError(f"{count} prompts need {count} sampling_params, or one; got {len(sampling_params)}")
        return list(sampling_params)

    def _complete(self, params: SamplingParams) -> SamplingParams:
        """Checked against the vocabulary, and with every end of sentence as a stop."""
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if any(not 0 <= token < self._vocab_size for token in ids):
                raise ValueError(f"{name}: token ids must be in [0, {self._vocab_size})")
        if params.ignore_eos or not self._more_eos:
            return params
        return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *self._more_eos))

    def _job(self, request_id: str, token_ids: list[int], params: SamplingParams, choice: int) -> Job:
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(SEED_BITS)
        prompt = np.array(token_ids, dtype="<i4").tobytes()
        add = Add(request_id=request_id, prompt=prompt, params=params, seed=seed, choice=choice)
        return Job(add, self.tokenizer)

    def _result(self, text: str | None, token_ids: list[int], choices: Sequence[Job]) -> RequestOutput:
        outputs = tuple(job.output() for job in choices)
        return RequestOutput(
            prompt=self.tokenizer.decode(token_ids, skip_special_tokens=False) if text is None else text,
            prompt_token_ids=tuple(token_ids),
            outputs=outputs[0],
            choices=outputs,
        )


def _nothing() -> None:
    """CUDA memory is freed with its tensors."""


def _listed_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Text, or a list of ids, is one prompt; any other list is many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(f"prompts must be text, a list of token ids or a list of these, got {type(prompts).__name__}")
    if prompts and all(isinstance(token, int | np.integer) for token in prompts):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


class Job:
    """One choice of one prompt while it runs: its tokens so far and their text."""

    def __init__(self, add: Add, tokenizer: Tokenizer) -> None:
        self.add = add
        self.finish_reason: FinishReason | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer, add.params.skip_special_tokens)
        self._stops = StopStrings(add.params.stop)
        self._text: list[str] = []

    def take(self, news: NewTokens) -> None:
        """Add what a step produced. Raises RuntimeError when the engine gave the request up."""
        assert news.first_position == len(self._token_ids), "an engine in this process loses no tokens"
        if news.error is not None:
            raise RuntimeError(f"the engine ended a request: {news.error}")
        self._logprobs += news.logprobs
        for token in news.token_ids:
            self._token_ids.append(token)
            if news.stop_token is None and self._show(self._detokenizer.push((token,))):
                self.finish_reason = FinishReason.STOP
                return
        if news.finish_reason is not None:
            self.finish_reason = news.finish_reason
            if self._show(self._detokenizer.flush()):
                self.finish_reason = FinishReason.STOP
            self._text.append(self._stops.flush())

    def _show(self, text: str) -> bool:
        """Add text; whether a stop string ends it. As with stop tokens, nothing stops before min_tokens."""
        if len(self._token_ids) <= self.add.params.min_tokens:
            self._text.append(text)
            return False
        shown, stopped = self._stops.push(text)
        self._text.append(shown)
        return stopped

    def output(self) -> CompletionOutput:
        """The finished answer."""
        assert self.finish_reason is not None, "only finished jobs have an output"
        return CompletionOutput(
            index=self.add.choice,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self.add.params.logprobs is not None else None,
        )


def run_jobs(core: EngineCore, prompts: Sequence[Sequence[Job]]) -> None:
    """Run all jobs (per prompt, its choices) to their ends. Whatever is raised, nothing of them stays in the engine.

    The first choice of a prompt goes alone until its first token, so that the others find the prompt in the cache.
    """
    running = {choices[0].add.request_id: choices[0] for choices in prompts}
    siblings = {choices[0].add.request_id: choices[1:] for choices in prompts}
    with _interrupts_between_steps() as check_interrupt, _aborted_on_error(core, running):
        for job in running.values():
            core.submit(job.add)
        while running:
            check_interrupt()
            events = core.step()
            if events is None:
                raise RuntimeError("the engine has nothing to do while requests are unfinished")
            for news in events.tokens:
                if news.request_id not in running:
                    continue  # ended by a stop string; the abort was on its way
                job = running[news.request_id]
                job.take(news)
                for sibling in siblings.pop(news.request_id, ()):
                    running[sibling.add.request_id] = sibling
                    core.submit(sibling.add)
                if job.finish_reason is not None:
                    del running[news.request_id]
                    if news.finish_reason is None:
                        core.submit(Abort(request_id=news.request_id))
        _drain(core)


@contextmanager
def _aborted_on_error(core: EngineCore, running: dict[str, Job]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for request_id in running:
            core.submit(Abort(request_id=request_id))
        _drain(core)
        raise


def _drain(core: EngineCore) -> None:
    """Let aborts take effect and steps in flight land."""
    while core.has_work:
        core.step()


@contextmanager
def _interrupts_between_steps() -> Iterator[Any]:
    """Hold Ctrl-C back until a step is complete: one in the middle would leave scheduler and runner apart.

    Gives a function to call between steps. A second Ctrl-C acts at once. Other threads never get one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        if asked and callable(before):
            before(number, frame)
        asked.append(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
