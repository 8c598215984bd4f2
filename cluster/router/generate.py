"""From the bytes of a request to a GenerationResponse: read, check, tokenise, plan. Everything that can be refused is
refused in here, before the cluster hears of it; cheap checks come before dear ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request

from cluster.errors import RequestError, UnavailableError
from cluster.router.answer import ChoiceText, NoText
from cluster.router.body import parse_object, read_body
from cluster.router.call import Call
from cluster.router.guard import REQUEST_ID
from cluster.router.openai.answers import AnswerFormat, AnswerHead, ChatFormat, CompletionFormat
from cluster.router.openai.chat import ChatRequest, parse_chat
from cluster.router.openai.completions import CompletionRequest, parse_completion
from cluster.router.openai.prompts import encode, tokens_to_keep
from cluster.router.openai.sampling import check_token_ids, sampling_params, with_bad_words
from cluster.router.plan import Plan, check_cost, make_plan, parse_timeout
from cluster.router.respond import GenerationResponse
from cluster.router.service import RouterService
from cluster.router.stream import AnswerOptions
from engine.text.tokenizer import Tokenizer

# a body above this is parsed off the event loop: 1 MiB of JSON takes some 10 ms
INLINE_BODY_BYTES = 32 << 10
# characters (or ids) above which a prompt is encoded off the loop: the change of threads costs as much as some 2,000
INLINE_PROMPT = 2048


async def chat(request: Request, service: RouterService) -> GenerationResponse:
    """POST /v1/chat/completions. Raises NeapError."""
    return await _generate(request, service, parse_chat)


async def completion(request: Request, service: RouterService) -> GenerationResponse:
    """POST /v1/completions. Raises NeapError."""
    return await _generate(request, service, parse_completion)


async def _generate(
    http: Request, service: RouterService, parse: Callable[[dict[str, Any]], ChatRequest | CompletionRequest]
) -> GenerationResponse:
    started = service.clock()
    service.check_open()
    deadline = started + parse_timeout(http.headers.get("x-neap-timeout-ms"), service.spec.default_timeout_s)
    with service.bodies.share() as take:
        body = await read_body(http.scope, http.receive, service.spec.max_body_bytes, take)
        read = partial(_read, body, parse)
        request = read() if len(body) <= INLINE_BODY_BYTES else await service.off_loop(read)
        service.metrics.requests.labels("chat" if isinstance(request, ChatRequest) else "completions").inc()
        service.check_model(request.model)
        plan, text = await _plan(service, request, http.scope[REQUEST_ID], deadline)
    service.check_open()  # again: a drain may have begun meanwhile
    return _response(service, text, request, plan, started)


async def _plan(
    service: RouterService, request: ChatRequest | CompletionRequest, request_id: str, deadline: float
) -> tuple[Plan, Tokenizer]:
    limits, text = service.limits(), service.text
    if text is None:
        raise UnavailableError("model_not_ready", retry_after_s=2.0)
    params = sampling_params(request, service.defaults, limits.vocab_size, text.eos_token_ids)
    keep = tokens_to_keep(request, params, limits.max_model_len)
    check_cost(request, _sizes(request, keep), limits.max_model_len, _param(request))
    work = partial(encode, text, request, keep)
    is_short = sum(size for size, _ in _sizes(request, None)) <= INLINE_PROMPT
    encoded = work() if is_short else await service.off_loop(work)
    for prompt in encoded.prompts:
        check_token_ids(prompt, limits.vocab_size)
    plan = make_plan(
        request,
        encoded.prompts,
        with_bad_words(params, encoded.bad_token_sequences),
        request_id=request_id,
        max_model_len=limits.max_model_len,
        deadline=deadline,
        echo=encoded.echo,
    )
    return plan, text


def _read(body: bytes, parse: Callable[[dict[str, Any]], ChatRequest | CompletionRequest]) -> Any:
    request = parse(parse_object(body))
    if request.stream_options is not None and not request.stream:
        raise RequestError("invalid_value", "stream_options needs stream to be true.", param="stream_options")
    return request


def _param(request: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _sizes(request: ChatRequest | CompletionRequest, keep: int | None) -> list[tuple[int, bool]]:
    if isinstance(request, ChatRequest):
        sizes = [(sum(len(message.content) for message in request.messages), False)]
    else:
        sizes = [(len(prompt), not isinstance(prompt, str)) for prompt in request.prompts]
    return sizes if keep is None else [(min(size, keep), True) for size, _ in sizes]


def _format(request: ChatRequest | CompletionRequest, plan: Plan, head: AnswerHead, text: Tokenizer) -> AnswerFormat:
    logprobs, piece, num_scores = plan.params.logprobs, text.token_bytes.piece, request.prompt_logprobs
    if isinstance(request, ChatRequest):
        return ChatFormat(head, logprobs=logprobs, token_bytes=piece, num_scores=num_scores)
    return CompletionFormat(head, logprobs=logprobs, token_bytes=piece, num_scores=num_scores, echo=request.echo)


def _response(
    service: RouterService, text: Tokenizer, request: ChatRequest | CompletionRequest, plan: Plan, started: float
) -> GenerationResponse:
    is_chat = isinstance(request, ChatRequest)
    head = AnswerHead(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{plan.request_id}",
        created=service.created + int(started - service.started_at),
        model=service.spec.served_model_name,
    )
    answer_format = _format(request, plan, head, text)
    stream = request.stream_options
    options = AnswerOptions(
        stream=request.stream,
        include_usage=stream is not None and stream.include_usage,
        continuous_usage=stream is not None and stream.continuous_usage_stats,
        ping_s=service.ping_s,
    )

    choice_text = NoText if isinstance(request, CompletionRequest) and request.is_echo_only else ChoiceText

    def make_call(on_overflow: Callable[[], None]) -> Call:
        return Call(
            plan,
            lambda choice: choice_text(choice, plan.params, text),
            service.calls,
            started=started,
            on_overflow=on_overflow,
        )

    return GenerationResponse(make_call, answer_format, options, service.metrics)
