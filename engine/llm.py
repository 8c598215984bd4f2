"""The offline API: an engine in this process, for scripts and notebooks.

    from neap import LLM, SamplingParams
    llm = LLM("path/to/checkpoint", max_model_len=4096)
    for output in llm.generate(["Hello", "你好"], SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128)):
        print(output.prompt, output.outputs.text)

Life cycle of a call: all is checked and tokenised -> Adds -> steps until all have ended -> results in input order.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from engine.config import EngineConfig
from engine.engine import build_engine
from engine.foreign_options import translate
from engine.llm_jobs import CompletionOutput as CompletionOutput
from engine.llm_jobs import Job, run_jobs
from engine.messages import Add
from engine.models.hub import lines_of_progress, model_folder
from engine.request import SEED_BITS, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.text.bad_words import bad_token_sequences
from engine.text.generation_defaults import read_generation_defaults
from engine.text.tokenizer import Tokenizer
from engine.tiny.embedded import EMBEDDED_CHECKPOINT

_log = logging.getLogger(__name__)
Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt and its answers: `outputs` is the first choice, `choices` are all n of them.

    `prompt` is the text given; for token ids and conversations, what the ids decode to. `prompt_logprobs` has one entry
    per prompt token where they were asked for, None for the first.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    outputs: CompletionOutput
    choices: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class LLM:
    """An engine with its tokenizer. Not thread-safe. Usable as a context manager; `close` frees its memory.

    `model` is a checkpoint's folder or a Hugging Face id (`revision`: its branch, tag or commit); without it, the
    small model that comes with the package (engine/tiny/README.md says what it can answer).
    `options` are the fields of EngineConfig (max_model_len, dtype, device, max_num_seqs, threads, kv_cache_bytes, ...);
    those of FastDeploy's and vLLM's LLM are understood as engine/foreign_options.py lists them.
    `seed` is where the seeds of requests without one come from. Raises ValueError for wrong options or checkpoints.
    """

    def __init__(self, model: str | Path | None = None, *, revision: str = "", seed: int = 0, **options: Any) -> None:
        known = frozenset(field.name for field in dataclasses.fields(EngineConfig)) - {"model"}
        options, notices = translate(options, known)
        if notices:
            _log.warning("no meaning here, ignored: %s", ", ".join(notices))
        path = _fetched(str(model), revision) if model is not None else EMBEDDED_CHECKPOINT
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
        *,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Complete one or many prompts (text or token ids), results in the same order.

        One SamplingParams for all, one for each, or None for the checkpoint's defaults; one `priority` for each, lower
        ones sooner; prompts share cached KV only with prompts of the same `cache_salt`. Raises ValueError for anything
        wrong with any of them before anything runs. Ctrl-C aborts what runs and leaves the engine usable.
        """
        listed = _listed_prompts(prompts)
        params = self._listed_params(sampling_params, len(listed))
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        token_ids = [self._encode(prompt, f"prompts[{index}]") for index, prompt in enumerate(listed)]
        return self._run(texts, token_ids, params, priority, cache_salt)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the checkpoint's chat template. Otherwise as `generate`."""
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[object] = messages if many else [messages]
        params = self._listed_params(sampling_params, len(conversations))
        token_ids = [
            self.tokenizer.encode_chat(
                conversation, add_generation_prompt=add_generation_prompt, extra=chat_template_kwargs
            )
            for conversation in conversations
        ]
        return self._run([None] * len(token_ids), token_ids, params, priority, cache_salt, "conversations")

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
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int | np.integer) for token in prompt):
            raise ValueError(f"{where} must be text or a list of token ids, got {type(prompt).__name__}")
        return [int(token) for token in prompt]

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
        sampling_params: Sequence[SamplingParams],
        priority: Sequence[int] | None,
        cache_salt: str,
        what: str = "prompts",
    ) -> list[RequestOutput]:
        if not self._free.alive:
            raise ValueError("this LLM is closed")
        if priority is not None and len(priority) != len(token_ids):
            raise ValueError(f"{len(token_ids)} prompts need {len(token_ids)} priorities, got {len(priority)}")
        params = [self._complete(one) for one in sampling_params]
        kept = [
            self._check_ids(self._truncated(ids, one), f"{what}[{index}]")
            for index, (ids, one) in enumerate(zip(token_ids, params, strict=True))
        ]
        self._num_calls += 1
        salt = cache_salt.encode()
        jobs = [
            [self._job(index, choice, ids, one, priority[index] if priority else 0, salt) for choice in range(one.n)]
            for index, (ids, one) in enumerate(zip(kept, params, strict=True))
        ]
        run_jobs(self._engine.core, jobs)
        return [self._result(text, ids, choices) for text, ids, choices in zip(texts, kept, jobs, strict=True)]

    def _truncated(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The end of a prompt, as far as truncate_prompt_tokens wants it."""
        keep = params.truncate_prompt_tokens
        if keep == -1:
            keep = max(self._engine.max_model_len - (params.max_tokens or 1), 1)
        return token_ids if keep is None else token_ids[-keep:]

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
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            if any(not 0 <= token < self._vocab_size for token in getattr(params, name)):
                raise ValueError(f"{name}: token ids must be in [0, {self._vocab_size})")
        if params.bad_words:
            sequences = bad_token_sequences(self.tokenizer, params.bad_words)
            params = dataclasses.replace(params, bad_token_sequences=(*params.bad_token_sequences, *sequences))
        if params.ignore_eos or not self._more_eos:
            return params
        return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *self._more_eos))

    def _job(
        self, index: int, choice: int, token_ids: list[int], params: SamplingParams, priority: int, salt: bytes
    ) -> Job:
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(SEED_BITS)
        prompt = np.array(token_ids, dtype="<i4").tobytes()
        if choice:  # the first choice tells the prompt's logprobs for all
            params = dataclasses.replace(params, prompt_logprobs=None)
        add = Add(
            request_id=f"{self._num_calls}-{index}-{choice}",
            prompt=prompt,
            params=params,
            seed=seed,
            choice=choice,
            cache_salt=salt,
            priority=priority,
        )
        return Job(add, self.tokenizer)

    def _result(self, text: str | None, token_ids: list[int], choices: Sequence[Job]) -> RequestOutput:
        outputs = tuple(job.output() for job in choices)
        return RequestOutput(
            prompt=self.tokenizer.decode(token_ids, skip_special_tokens=False) if text is None else text,
            prompt_token_ids=tuple(token_ids),
            outputs=outputs[0],
            choices=outputs,
            prompt_logprobs=self._scores(choices[0]),
        )

    def _scores(self, first: Job) -> tuple[TokenLogprobs | None, ...] | None:
        return None if first.add.params.prompt_logprobs is None else (None, *first.prompt_logprobs)


def _fetched(model: str, revision: str) -> Path:
    """A download takes minutes: its progress goes to stderr."""
    return model_folder(
        model, revision=revision, progress=lines_of_progress(model, lambda line: print(line, file=sys.stderr))
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
