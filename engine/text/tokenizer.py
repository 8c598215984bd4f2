"""A checkpoint's tokenizer: text to ids, ids to text, conversations to ids. Torch-free; calls may come from any thread.

Control tokens (special ones, and any added token of the form <...>) inside a message's text are encoded as plain text,
so nobody can end a turn or open another role from within a message.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.text.chat_template import ChatTemplate, Message, check_messages
from engine.text.sentencepiece_model import parse_sentencepiece, to_tokenizer_json
from engine.text.token_bytes import TokenBytes, read_token_bytes

# Both end a turn whatever the configuration says: config.json names </s>, histories end with the other.
_ERNIE_EOS_TOKENS = ("</s>", "<|end_of_sentence|>")
_THINKING_EOS_TOKEN = "<|im_end|>"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARKUP = re.compile(r"<.*>", re.DOTALL)
# An assistant's earlier answer may hold these by right: templates look for them.
_ANSWER_MARKUP = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")


class Tokenizer:
    """Made by `load`. `special_ids`: ids that decoding may skip; `eos_token_ids`: ids that end an answer, ascending."""

    def __init__(self, folder: Path) -> None:
        config = _read_object(folder / "tokenizer_config.json")
        self._folder = folder
        self._file, content = _read_tokenizer(folder)
        self._tokenizer = _parse(content, self._file)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.token_bytes: TokenBytes = read_token_bytes(content, vocab)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        control = {token.content: token_id for token_id, token in added.items() if _is_control(token)}
        self._control_ids: dict[str, int] = control
        self._control = _any_of(control)
        self._control_in_answers = _any_of(token for token in control if token not in _ANSWER_MARKUP)
        special_tokens = _special_tokens(config)
        self.template = ChatTemplate(_template_source(folder, config), special_tokens)
        self.eos_token_ids = _eos_token_ids(folder, vocab, special_tokens, self.template.source)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder: tokenizer.json or a SentencePiece tokenizer.model, and the configuration files.

        Only one of the first two must exist. Raises ValueError naming the file that is missing or not understood.
        """
        return cls(Path(path))

    @property
    def vocab_size(self) -> int:
        """Highest id plus one. A model's own size may be larger, by padding."""
        return len(self.token_bytes.pieces)

    def encode(self, text: str, *, parse_special: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt. Raises ValueError for text that is not valid Unicode.

        parse_special: whether "<s>" and the like in the text mean the token or its characters.
        add_special_tokens: whether to add what the tokenizer puts around a sequence (ERNIE: nothing).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: lone surrogate at character {error.start}") from error
        chosen = self._tokenizer if parse_special else self._literal_tokenizer
        return list(chosen.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids without a token add nothing."""
        return self.token_bytes.decode(token_ids, self.special_ids if skip_special_tokens else ())

    def render_chat(self, messages: object, *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Raises ValueError for messages that are not valid or not accepted."""
        return self.template.render(check_messages(messages), add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: object, *, add_generation_prompt: bool = True, extra: Mapping[str, object] | None = None
    ) -> list[int]:
        """Token ids of a conversation. `extra`: further template variables. Raises ValueError as render_chat does."""
        mark = f"\ue000{secrets.token_hex(8)}."
        hidden: list[str] = []
        safe = [self._hide_control(message, mark, hidden) for message in check_messages(messages)]
        text = self.template.render(safe, add_generation_prompt=add_generation_prompt, extra=extra)
        if not hidden:
            return self.encode(text, add_special_tokens=False)
        return self._encode_hidden(text, mark, hidden)

    def _hide_control(self, message: Message, mark: str, hidden: list[str]) -> Message:
        """Replace control tokens in the content by marks, numbered in `hidden`, that templates carry through."""
        control = self._control_in_answers if message["role"] == "assistant" else self._control
        if control is None:
            return message

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}\ue001"

        return {**message, "content": control.sub(hide, message["content"])}

    def _encode_hidden(self, text: str, mark: str, hidden: Sequence[str]) -> list[int]:
        """Cut the rendered text at the template's own control tokens; everything between is plain text."""
        marked = re.compile(re.escape(mark) + "([0-9]+)\ue001")
        token_ids: list[int] = []
        position = 0
        matches = list(self._control.finditer(text)) if self._control else []
        for start, end in [*((match.start(), match.end()) for match in matches), (len(text), len(text))]:
            plain = marked.sub(lambda match: hidden[int(match[1])], text[position:start])
            if mark in plain:
                raise ValueError("the chat template does not accept control tokens inside a message")
            if plain:
                token_ids += self.encode(plain, parse_special=False, add_special_tokens=False)
            if end > start:
                token_ids.append(self._control_ids[text[start:end]])
            position = end
        return token_ids

    @cached_property
    def _literal_tokenizer(self) -> Any:
        """The same tokenizer without its control tokens. Made when first needed: hostile or unusual text only."""
        _, content = _read_tokenizer(self._folder)
        content["added_tokens"] = [
            token for token in content.get("added_tokens", []) if token["content"] not in self._control_ids
        ]
        return _parse(content, self._file)


def _read_tokenizer(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file, and its content in the form of a tokenizer.json. Raises ValueError."""
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if file.is_file():
        return file, _read_object(file)
    if not model.is_file():
        raise ValueError(f"{file} is missing, and so is tokenizer.model: a checkpoint needs one to work with text")
    try:
        return model, to_tokenizer_json(parse_sentencepiece(model.read_bytes()), _added_tokens(folder))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{model}: {error}") from error


def _added_tokens(folder: Path) -> dict[str, tuple[int | None, bool]]:
    """Tokens beside a tokenizer.model, from the files that name them: text -> (id if it is told, whether special)."""
    config = _read_object(folder / "tokenizer_config.json")
    added: dict[str, tuple[int | None, bool]] = {}
    for text, token_id in _read_object(folder / "added_tokens.json").items():
        added[text] = (int(token_id), False)
    decoder = config.get("added_tokens_decoder")
    for token_id, token in (decoder if isinstance(decoder, dict) else {}).items():
        added[token["content"]] = (int(token_id), bool(token.get("special")))
    for names in (config, _read_object(folder / "special_tokens_map.json")):
        more = names.get("additional_special_tokens") or []
        listed = [one.get("content") if isinstance(one, dict) else one for one in more]
        for text in (*_special_tokens(names).values(), *(one for one in listed if isinstance(one, str))):
            added[text] = (added.get(text, (None, True))[0], True)
    return added


def _parse(content: Mapping[str, Any], path: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not understood: {error}") from error


def _is_control(token: Any) -> bool:
    return bool(token.content) and (token.special or _MARKUP.fullmatch(token.content) is not None)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of these strings; None for none."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json, given as text or as an object with its content."""
    named = {name: config.get(name) for name in _SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json; None when the checkpoint has neither."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text")
    return template


def _eos_token_ids(
    folder: Path, vocab: Mapping[str, int], special_tokens: Mapping[str, str], template: str
) -> tuple[int, ...]:
    names = {*_ERNIE_EOS_TOKENS, special_tokens.get("eos_token", "")}
    if _THINKING_EOS_TOKEN in template:
        names.add(_THINKING_EOS_TOKEN)
    found = {vocab[name] for name in names if name in vocab}
    for file in ("generation_config.json", "config.json"):
        value = _read_object(folder / file).get("eos_token_id")
        found.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    return tuple(sorted(found))


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one when it is missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object")
    return content
