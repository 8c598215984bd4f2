"""transformers as its users run it: eager, sdpa, a DynamicCache. The only module of the product that imports it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from engine.bench.subject import SubjectSpec
from engine.bench.workload import MixedRequest

_WARM_TOKENS = 2


class TransformersSubject:
    """See Subject."""

    def __init__(self, spec: SubjectSpec) -> None:
        torch.set_num_threads(spec.threads)
        transformers.utils.logging.disable_progress_bar()
        dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, attn_implementation="sdpa")
        self._model = model.eval().to(self._device)
        self._cache: tuple[int, DynamicCache, Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return int(self._model.config.vocab_size)

    @property
    def versions(self) -> dict[str, str]:
        """Of the library and of torch."""
        return {"torch": str(torch.__version__), "transformers": transformers.__version__}

    @torch.inference_mode()
    def prefill_s(self, prompt: Sequence[int]) -> float:
        """One forward pass, the head for the last token only, and its argmax."""
        self._cache = None
        start_s = time.perf_counter()
        _, token = self._fill([prompt])
        token.cpu()
        return time.perf_counter() - start_s

    @torch.inference_mode()
    def prepare_decode(self, prompts: Sequence[Sequence[int]]) -> None:
        """Keeps the prompts' cache for the runs."""
        self._cache = None
        cache, token = self._fill(prompts)
        self._cache = (len(prompts[0]), cache, token)
        self.decode_rate(prompts, _WARM_TOKENS)

    @torch.inference_mode()
    def decode_rate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> float:
        """Steps of the whole batch from the kept cache, which is cut back to the prompts first."""
        assert self._cache is not None, "prepare_decode comes first"
        context, cache, token = self._cache
        if (surplus := cache.get_seq_length() - context) > 0:
            cache.crop(-surplus)
        token.cpu()
        start_s = time.perf_counter()
        for _ in range(num_new_tokens):
            token = self._step(token, cache)
        token.cpu()
        return len(prompts) * num_new_tokens / (time.perf_counter() - start_s)

    @torch.inference_mode()
    def mixed_rate(self, requests: Sequence[MixedRequest]) -> float:
        """One left-padded static batch through generate(); only the tokens asked for count."""
        self._cache = None
        width = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        longest = max(request.num_output_tokens for request in requests)
        start_s = time.perf_counter()
        self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
        )
        return sum(request.num_output_tokens for request in requests) / (time.perf_counter() - start_s)

    def _fill(self, prompts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor]:
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        return cache, self._step(ids, cache)

    def _step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """[B, 1], the greedy next tokens of ids [B, T]."""
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        next_ids: Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return next_ids
