"""Two tokenizers: byte-level (ours) and a small one of the SentencePiece family, as ERNIE's checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer


def write_sentencepiece_like(folder: Path, *, prefix_space: bool = False) -> None:
    """A BPE with byte fallback over a few words; the chat template is the built-in one."""
    special = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_end|>"]
    tokens = [*special, "<think>", "</think>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokens += ["\u2581", *"abcdefghijklmnopqrstuvwxyzUA:", "你", "好"]
    merges = [("h", "i"), ("t", "h"), ("th", "e"), ("\u2581", "the")]
    tokens += ["".join(pair) for pair in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    space = [normalizers.Prepend("\u2581")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    write_sentencepiece_like(folder)
    return folder


@pytest.fixture(scope="session")
def prefix_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    write_sentencepiece_like(folder, prefix_space=True)
    return folder


@pytest.fixture(scope="session", params=["byte_folder", "piece_folder", "prefix_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(request.param)
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)
