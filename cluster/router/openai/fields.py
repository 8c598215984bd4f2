"""What both generation endpoints accept, and what is refused by name.

Every field is one of: declared in a model (implemented), ignored on purpose, neutral (its value asks for nothing), or
refused with 400 unsupported_parameter. Nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import RequestError
from engine.request import MAX_LOGIT_BIAS

IGNORED = frozenset({"user", "metadata", "service_tier"})

# fields that exist elsewhere and are not implemented here -> the values that ask for nothing (null and empty always do)
_FALSE: tuple[object, ...] = (False,)
NEUTRAL: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),  # without tools either is true
    "functions": (),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
    "store": _FALSE,
    "prediction": (),
    "audio": (),
    "verbosity": (),
    "web_search_options": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "include_stop_str_in_output": _FALSE,
    "spaces_between_special_tokens": (True,),
    "logprob_token_ids": (),
    "return_token_ids": _FALSE,
    "return_tokens_as_token_ids": _FALSE,
    "use_beam_search": _FALSE,
    "length_penalty": (1.0,),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "continue_final_message": _FALSE,
    "documents": (),
    "thinking_token_budget": (),
    "reasoning_max_tokens": (),
    "include_reasoning": (True,),
    "session_id": (),
    "kv_transfer_params": (),
    "suffix": (),
    "best_of": (1,),
}
NEUTRAL_BY_ENDPOINT: dict[str, dict[str, tuple[object, ...]]] = {
    "chat": {"add_special_tokens": _FALSE, "echo": _FALSE},
    "tokenize": {"add_special_tokens": (True, False), "chat_template": ()},
    "detokenize": {},
    "completions": {"add_special_tokens": (True,), "chat_template_kwargs": (), "add_generation_prompt": (True,)},
}
_NEUTRAL_MESSAGE: dict[str, tuple[object, ...]] = {"tool_calls": (), "refusal": (), "annotations": ()}
_NEUTRAL_STREAM_OPTIONS: dict[str, tuple[object, ...]] = {"include_obfuscation": _FALSE}

MAX_SALT_CHARS = 256
MAX_LABEL_CHARS = 128  # printable ASCII: it goes back as a header

_Model = TypeVar("_Model", bound=BaseModel)


def _same(value: object, neutral: object) -> bool:
    # True == 1 in Python, but not in JSON
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def is_neutral(value: object, accepted: tuple[object, ...]) -> bool:
    """Whether a value asks for nothing: null, an empty string or container, or one of `accepted`."""
    if value is None or (isinstance(value, str | list | dict) and not value):
        return True
    return any(_same(value, neutral) for neutral in accepted)


def strip_unsupported(
    data: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[object, ...]], prefix: str = ""
) -> dict[str, Any]:
    """The declared, non-null fields of `data`. Raises RequestError unsupported_parameter naming the first other one."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif not (prefix == "" and name in IGNORED) and not is_neutral(value, neutral.get(name, ())):
            shown = prefix + (name if len(name) <= 64 else name[:64] + "...")
            raise RequestError("unsupported_parameter", f"The parameter {shown!r} is not supported.", param=shown)
    return kept


class StreamOptions(BaseModel):
    """What a stream reports beside the text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(BaseModel):
    """The fields of both endpoints. None: the client did not say, so the model's default holds."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    n: int = 1
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = None
    bad_words_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None
    request_id: Annotated[str, Field(max_length=MAX_LABEL_CHARS, pattern=r"^[!-~]*$")] | None = None

    @property
    def scores_param(self) -> str:
        """The field that asks for logprobs of the prompt."""
        return "prompt_logprobs"


class Message(BaseModel):
    """One turn. A client may send `content` as a list of text parts too; they are joined before validation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str
    content: str = ""


def _plain_message(item: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Only declared fields, content as one string. Images and other media are refused: nothing is ever fetched."""
    kept = strip_unsupported(item, frozenset(Message.model_fields), _NEUTRAL_MESSAGE, prefix)
    parts = kept.get("content")
    if not isinstance(parts, list):
        return kept
    texts: list[str] = []
    for index, part in enumerate(parts):
        where = f"{prefix}content[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestError("invalid_value", f"{where} must be an object with a type.", param=where)
        if part["type"] != "text":
            raise RequestError("unsupported_parameter", "Only text parts are supported.", param=f"{where}.type")
        text = strip_unsupported(part, frozenset({"type", "text"}), {}, f"{where}.").get("text")
        if not isinstance(text, str):
            raise RequestError("invalid_value", f"{where}.text must be a string.", param=f"{where}.text")
        texts.append(text)
    return kept | {"content": "\n".join(texts)}


def validate(model: type[_Model], data: Mapping[str, Any], endpoint: str) -> _Model:
    """Check a body against a model. Raises RequestError naming the parameter."""
    neutral = NEUTRAL | NEUTRAL_BY_ENDPOINT[endpoint]
    kept = strip_unsupported(data, frozenset(model.model_fields), neutral)
    options = kept.get("stream_options")
    if isinstance(options, dict):
        known = frozenset(StreamOptions.model_fields)
        kept["stream_options"] = strip_unsupported(options, known, _NEUTRAL_STREAM_OPTIONS, "stream_options.")
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [
            _plain_message(item, f"messages[{index}].") if isinstance(item, dict) else item
            for index, item in enumerate(messages)
        ]
    bias = kept.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:  # before pydantic notes a finding for each
        raise RequestError("invalid_value", f"logit_bias: at most {MAX_LOGIT_BIAS} ids.", param="logit_bias")
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> RequestError:
    """The first finding in our form. Pydantic's message texts are fixed; the offending value is not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in _NAMES:
            param += f".{part}" if param else part
        else:
            break  # the branch of a union, or a key that the client chose
    return RequestError("invalid_value", f"{param or 'body'}: {first['msg']}", param=param or None)


_NAMES = (
    frozenset(GenerationFields.model_fields)
    | frozenset(StreamOptions.model_fields)
    | frozenset(Message.model_fields)
    | {"messages", "prompt", "logprobs", "top_logprobs", "max_completion_tokens", "echo"}
    | {"chat_template_kwargs", "add_generation_prompt", "tokens", "add_special_tokens", "return_token_strs"}
)
