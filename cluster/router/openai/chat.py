"""POST /v1/chat/completions: the request model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from cluster.errors import RequestError
from cluster.router.openai.fields import GenerationFields, Message, validate

MAX_MESSAGES = 2048
# "tool" and "function" come with tools; "developer" is OpenAI's newer word for system
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ChatRequest(GenerationFields):
    """A conversation to continue."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> tuple[str, int] | None:
        """Which parameter limits the answer, and to how many tokens."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)


def parse_chat(data: Mapping[str, Any]) -> ChatRequest:
    """Check a body. Raises RequestError naming the parameter."""
    request = validate(ChatRequest, data, "chat")
    for index, message in enumerate(request.messages):
        if message.role not in ROLES:
            raise RequestError(
                "invalid_value", f"A role must be one of {', '.join(ROLES)}.", param=f"messages[{index}].role"
            )
        if "content" not in message.model_fields_set and message.role != "assistant":
            raise RequestError("invalid_value", "A message needs content.", param=f"messages[{index}].content")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("invalid_value", "top_logprobs needs logprobs to be true.", param="top_logprobs")
    return request
