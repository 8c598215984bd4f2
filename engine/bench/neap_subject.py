"""Our engine, driven step by step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch

from engine.bench.subject import SubjectSpec
from engine.bench.workload import MixedRequest
from engine.config import EngineConfig
from engine.engine import build_engine
from engine.messages import Add
from engine.models.model_config import load_model_config
from engine.request import SamplingParams

_MAX_MODEL_LEN = 4096
_WARM_TOKENS = 4


class NeapSubject:
    """See Subject. Decode windows and rates as ../shared/peers defines them for engines that batch continuously."""

    def __init__(self, spec: SubjectSpec) -> None:
        """Raises ValueError for whatever the user can cause."""
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(spec.options) - known):
            raise ValueError(f"there is no engine option {unknown[0]}; the options are {', '.join(sorted(known))}")
        longest = load_model_config(spec.model_dir).max_position_embeddings
        settings: dict[str, object] = {
            "dtype": spec.dtype,
            "threads": spec.threads,
            "kv_cache_bytes": spec.kv_cache_bytes,
            "max_model_len": min(_MAX_MODEL_LEN, longest),
            **spec.options,
        }
        self._built = build_engine(EngineConfig(model=spec.model, **settings))  # type: ignore[arg-type]
        self._num_requests = 0

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._built.model_config.vocab_size

    @property
    def versions(self) -> dict[str, str]:
        """The numerics class names kernels and threads."""
        return {"torch": str(torch.__version__), "numerics": self._built.numerics_class}

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """Time to the first token, alone."""
        return self._run([(prompt, 1)])[-1][0]

    def prepare_decode(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts stay in the prefix cache."""
        self._run([(prompt, _WARM_TOKENS) for prompt in prompts])

    def decode_rate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> float:
        """Between the step after which all have a token and the last one in which none has ended."""
        log = self._run([(prompt, num_new_tokens + 1) for prompt in prompts])
        window = [
            (at, sum(counts.values()))
            for at, counts in log
            if len(counts) == len(prompts) and max(counts.values()) <= num_new_tokens
        ]
        (first_s, first_count), (last_s, last_count) = window[0], window[-1]
        return (last_count - first_count) / (last_s - first_s)

    def mixed_rate(self, requests: Sequence[MixedRequest]) -> float:
        """All at once."""
        total = sum(request.num_output_tokens for request in requests)
        return total / self._run([(request.prompt, request.num_output_tokens) for request in requests])[-1][0]

    def _run(self, requests: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, dict[str, int]]]:
        """(seconds, tokens so far by request) after each step, of prompts and their output lengths."""
        core = self._built.core
        counts: dict[str, int] = {}
        log = []
        start_s = time.perf_counter()
        for prompt, num_tokens in requests:
            self._num_requests += 1
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            ids = np.asarray(prompt, dtype="<i4").tobytes()
            core.submit(Add(request_id=str(self._num_requests), prompt=ids, params=params, seed=0))
        while core.has_work:
            events = core.step()
            for news in events.tokens if events is not None else ():
                if news.error is not None:
                    raise ValueError(f"the engine refused a request of {self._describe(requests)}: {news.error}")
                counts[news.request_id] = counts.get(news.request_id, 0) + len(news.token_ids)
            log.append((time.perf_counter() - start_s, dict(counts)))
        return log

    def _describe(self, requests: Sequence[tuple[Sequence[int], int]]) -> str:
        longest = max(len(prompt) + num_tokens for prompt, num_tokens in requests)
        return f"up to {longest} tokens (max_model_len {self._built.max_model_len})"
