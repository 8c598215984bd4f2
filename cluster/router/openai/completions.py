"""POST /v1/completions: the request model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from cluster.errors import RequestError
from cluster.router.openai.fields import GenerationFields, validate

MAX_PROMPTS = 32
DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class CompletionRequest(GenerationFields):
    """One prompt or up to 32, as text or as token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    logprobs: int | None = None
    echo: bool = False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, None for no logprobs at all."""
        return self.logprobs

    @property
    def is_echo_only(self) -> bool:
        """Whether nothing but the prompt is wanted back."""
        return self.echo and self.max_tokens == 0

    @property
    def scores_param(self) -> str:
        """The field that asks for logprobs of the prompt."""
        return "prompt_logprobs" if self.prompt_logprobs is not None else "echo"

    @property
    def asked_tokens(self) -> tuple[str, int]:
        """Which parameter limits the answer, and to how many tokens."""
        return "max_tokens", DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, in order."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = self.prompt
        if prompts and isinstance(prompts[0], int):
            return [prompts]
        return prompts


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """Check a body. Raises RequestError naming the parameter."""
    prompt = data.get("prompt")
    # told before pydantic walks a long list
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise RequestError("invalid_value", f"At most {MAX_PROMPTS} prompts in a request.", param="prompt")
    request = validate(CompletionRequest, data, "completions")
    if not request.prompts or any(len(prompt) == 0 for prompt in request.prompts):
        raise RequestError("invalid_value", "A prompt must not be empty.", param="prompt")
    return request
