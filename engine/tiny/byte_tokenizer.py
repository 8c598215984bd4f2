"""Writes a byte-level tokenizer with ERNIE's special tokens: any text is its UTF-8 bytes, one token each.

It goes with the small checkpoints of this folder, so that everything above the model works without a download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.text.chat_template import ERNIE_TEXT_TEMPLATE

# In the order of their ids. Those of ERNIE 4.5 that are known: 0, 1, 2.
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<mask:1>",
    "<mask:4>",
    "<mask:5>",
    "<mask:6>",
    "<mask:7>",
    "<|im_start|>",
    "<|im_end|>",
)
# Part of the answer's text: parsers look for them, so decoding keeps them.
MARKUP_TOKENS = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
_PADDED_TO = 16


def write_byte_tokenizer(path: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json into a folder.

    Returns the size of the vocabulary, padded to a multiple of 16; the padding decodes to nothing.
    """
    added = (*SPECIAL_TOKENS, *MARKUP_TOKENS)
    vocab = {token: index for index, token in enumerate((*added, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    write_tokenizer_settings(path, ERNIE_TEXT_TEMPLATE, {"do_sample": True, "temperature": 0.8, "top_p": 0.8})
    return -(-len(vocab) // _PADDED_TO) * _PADDED_TO


def write_tokenizer_settings(path: Path, chat_template: str, sampling: Mapping[str, object]) -> None:
    """tokenizer_config.json and generation_config.json of a folder whose tokenizer begins with SPECIAL_TOKENS.

    sampling: what generation_config.json says for requests that say nothing.
    """
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "mask_token": "<mask:1>",
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
    )
    _write_json(
        path / "generation_config.json",
        {
            "bos_token_id": ids["<s>"],
            "eos_token_id": [ids["</s>"], ids["<|end_of_sentence|>"]],
            "pad_token_id": ids["<unk>"],
            **sampling,
        },
    )


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
