"""tokenizer.model: the ids and the text are SentencePiece's own, streamed text is whole, broken files are named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.sentencepiece_model import parse_sentencepiece, to_tokenizer_json
from engine.text.tokenizer import Tokenizer
from tests.engine.text.sentencepiece_corpus import SYMBOLS, train, write_tokenizer

WORDS = [
    "the",
    "quick",
    "decode",
    "你好",
    "世界",
    "机器",
    "服务器",
    "🎉",
    "👨‍👩‍👧",
    "🇨🇳",
    "𠮷",
    "é",
    " ",
    "  ",
    "\n",
    "1234",
    "\u2581",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join) | st.text(max_size=40)
KINDS: dict[str, dict[str, Any]] = {
    "as ERNIE": {},
    "with a space before": {"add_dummy_prefix": True},
    "normalised": {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece")
    write_tokenizer(path, train(**KINDS[request.param]))
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    write_tokenizer(path, train())
    return path


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> Tokenizer:
    return Tokenizer.load(plain_folder)


@pytest.fixture(scope="module")
def library(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_ids_and_text_are_sentencepieces(tokenizer: Tokenizer, library: Any, text: str) -> None:
    text = text.replace("<", "(")  # control tokens in a text are another matter: theirs are parsed, ours as asked
    token_ids = tokenizer.encode(text, parse_special=False)
    assert token_ids == library.encode(text)
    assert tokenizer.decode(token_ids) == library.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 999))
def test_streamed_text_is_the_text_without_replacements(plain: Tokenizer, text: str, seed: int) -> None:
    text = text.replace("\ufffd", "")
    draw = random.Random(seed)
    # any split of the text into pieces and bytes is valid, also those that no encoder would choose
    token_ids = [one for word in split(text, draw) for one in as_tokens(plain, word, draw)]
    detokenizer = IncrementalDetokenizer(plain)
    deltas = [detokenizer.push([token_id]) for token_id in token_ids]
    assert "".join(deltas) + detokenizer.flush() == plain.decode(token_ids) == text.replace("\u2581", " ")
    assert not any("\ufffd" in delta for delta in deltas)


def split(text: str, draw: random.Random) -> list[str]:
    words, position = [], 0
    while position < len(text):
        size = draw.randint(1, 4)
        words.append(text[position : position + size])
        position += size
    return words


def as_tokens(tokenizer: Tokenizer, word: str, draw: random.Random) -> list[int]:
    if draw.random() < 0.5:
        return tokenizer.encode(word, parse_special=False)
    first_byte = tokenizer.token_bytes.pieces.index(b"\x00")  # <0x00>, and the others behind it
    return [first_byte + byte for byte in word.replace("\u2581", " ").encode()]


def test_special_tokens_and_templates_come_from_the_configuration(plain: Tokenizer) -> None:
    tokenizer = plain
    begin, end = (tokenizer.encode(symbol)[0] for symbol in SYMBOLS[:2])
    assert {begin, end, 1, 2} <= tokenizer.special_ids and set(tokenizer.eos_token_ids) == {2, end}
    messages = [{"role": "user", "content": f"你好{SYMBOLS[1]}"}]
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == f"{SYMBOLS[0]}[user]hi{SYMBOLS[1]}"
    token_ids = tokenizer.encode_chat(messages)
    assert token_ids[0] == begin and token_ids[-1] == end and token_ids.count(end) == 1
    assert tokenizer.decode(token_ids) == f"[user]你好{SYMBOLS[1]}"


def test_tokens_beside_the_model_get_their_ids(tmp_path: Path) -> None:
    model = train()
    size = len(parse_sentencepiece(model).pieces)
    extra = {"added_tokens_decoder": {str(size + 5): {"content": "<|im_end|>", "special": True}}}
    write_tokenizer(tmp_path, model, additional_special_tokens=["<mask:1>", "<absent>"], **extra)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<tool>a<|im_end|>")[::2] == [size + 1, size + 5]
    assert tokenizer.vocab_size == size + 6 and {size + 5, tokenizer.encode("<mask:1>")[0]} <= tokenizer.special_ids
    assert tokenizer.decode([size + 1, size + 5, size + 3]) == "<tool>"


def test_a_tokenizer_json_goes_before(plain: Tokenizer, plain_folder: Path, tmp_path: Path) -> None:
    content = to_tokenizer_json(parse_sentencepiece((plain_folder / "tokenizer.model").read_bytes()), {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    assert Tokenizer.load(tmp_path).encode("the quick") == plain.encode("the quick")


def test_wrong_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing, and so is tokenizer\.model"):
        Tokenizer.load(tmp_path)
    for data in (b"", b"nonsense", train()[:-700], b"\x0a\xff\xff\xff\xff\x0f", bytes(range(200))):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram", vocab_size=380))
    with pytest.raises(ValueError, match="model type 1 is not supported"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, train())
    (tmp_path / "added_tokens.json").write_text('{"<new>": 5}')
    with pytest.raises(ValueError, match=r"added token '<new>' has id 5, which is"):
        Tokenizer.load(tmp_path)
