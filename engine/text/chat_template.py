"""Renders conversations to prompt text with the checkpoint's Jinja template, or ERNIE's text template without one.

Templates come with checkpoints, so they run in a sandbox and their output is bounded. Settings are those that published
templates are written for (transformers): trimmed blocks, loop controls, `raise_exception`, `tojson`, `strftime_now`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

MAX_RENDERED_CHARS = 16 << 20
MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")

# The text models' format: <bos>{system}\nUser: {u1}\nAssistant: {a1}<eos>User: {u2}\nAssistant:<space>
ERNIE_TEXT_TEMPLATE = (
    "{{- cls_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\\n' }}"
    "{%- elif message.role == 'assistant' -%}{{ 'Assistant: ' + message.content + sep_token }}"
    "{%- else -%}{{ raise_exception('this model has no role ' + message.role) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)
_ERNIE_TOKENS = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}

# what a request may set in its chat_template_kwargs -> values that ask for nothing where there is no switch
TEMPLATE_SWITCHES: dict[str, tuple[object, ...]] = {
    "enable_thinking": (False,),
    "options": ({"thinking_mode": "close"},),
}
THINKING_MODES = ("open", "close")

Message = dict[str, str]


class SwitchError(ValueError):
    """A chat_template_kwargs entry that cannot be followed. `name` is its key; `known` whether the key is allowed."""

    def __init__(self, name: str, message: str, *, known: bool) -> None:
        self.name = name
        self.known = known
        super().__init__(message)


def check_messages(messages: object) -> list[Message]:
    """Messages as {"role", "content"} with plain text: text parts are joined by newlines, developer becomes system.

    Raises ValueError naming the message (messages[i]...) and what was expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError("messages must be a list with at least one message")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"messages must be at most {MAX_MESSAGES}, got {len(messages)}")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object with role and content, got {type(message).__name__}")
    unknown = [str(key) for key in message if key not in ("role", "content", "name") and message[key] is not None]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]} is not supported")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
    role = "system" if role == "developer" else role
    return {"role": str(role), "content": _content_text(message.get("content"), f"{where}.content")}


def _content_text(content: object, where: str) -> str:
    if isinstance(content, str):
        return _check_text(content, where)
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise ValueError(f"{where} must be a string or a list of text parts, got {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f'{where}[{index}] must be {{"type": "text", "text": ...}}, got {kind!r}')
        texts.append(_check_text(part["text"], f"{where}[{index}].text"))
    return "\n".join(texts)


def _check_text(text: str, where: str) -> str:
    """Lone surrogates come from broken JSON escapes; no tokenizer can encode them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode: lone surrogate at character {error.start}") from error
    return text


class ChatTemplate:
    """A compiled template. `special_tokens` are its variables: bos_token, eos_token, cls_token, ...

    Raises ValueError when the template is not valid Jinja.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = ERNIE_TEXT_TEMPLATE if source is None else source
        self._special_tokens = {**_ERNIE_TOKENS, **special_tokens} if source is None else dict(special_tokens)
        try:
            environment = _environment()
            self._template = environment.from_string(self.source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error

    def check_switches(self, switches: Mapping[str, object]) -> dict[str, object]:
        """chat_template_kwargs of a client: of the allow-list, of the right type, and looked at by this template.

        Raises SwitchError (a ValueError).
        """
        for name, value in switches.items():
            if name not in TEMPLATE_SWITCHES:
                known = ", ".join(TEMPLATE_SWITCHES)
                raise SwitchError(name, f"chat_template_kwargs may hold {known}", known=False)
            if name == "enable_thinking" and not isinstance(value, bool):
                raise SwitchError(name, "enable_thinking must be true or false", known=True)
            if name == "options" and value not in [{"thinking_mode": mode} for mode in THINKING_MODES]:
                modes = " or ".join(THINKING_MODES)
                raise SwitchError(name, f'options must be {{"thinking_mode": ...}} with {modes}', known=True)
            if name not in self._variables and value not in TEMPLATE_SWITCHES[name]:
                raise SwitchError(name, f"this model's chat template has no switch {name}", known=False)
        return dict(switches)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of checked messages (`check_messages`). `extra` are further template variables.

        Raises ValueError when the template refuses the messages or its output is too long.
        """
        variables = {
            **self._special_tokens,
            **(extra or {}),
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise ValueError(f"the chat template's output exceeds {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the chat template does not accept these messages: {error}") from error
        return "".join(pieces)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)
