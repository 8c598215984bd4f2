"""A trained model as a checkpoint folder in the HF `-PT` layout, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny.training.model import Config, TinyErnie
from engine.tiny.training.tokenizer import write_tokenizer

# Routing is float32 in the published checkpoints too: a rounded score chooses another expert.
_FLOAT32 = ("mlp.gate.weight", "e_score_correction_bias")
_STACKED = ("gate_proj", "up_proj", "down_proj")


def write_checkpoint(folder: Path, model: TinyErnie, config: Config, tokenizer: Tokenizer, chat_template: str) -> None:
    """Everything that serving needs, weights in bfloat16."""
    write_tokenizer(tokenizer, folder, chat_template)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith(_FLOAT32) else torch.bfloat16).contiguous()
        for name, tensor in _named(model)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=2) + "\n")


def replace_checkpoint(
    folder: Path, model: TinyErnie, config: Config, tokenizer: Tokenizer, chat_template: str
) -> None:
    """`write_checkpoint` into a folder beside it, then take that folder's place."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    write_checkpoint(new, model, config, tokenizer, chat_template)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def read_checkpoint(folder: Path) -> TinyErnie:
    """The model of a folder that `write_checkpoint` made, in float32. Raises KeyError for a tensor that is missing."""
    model = TinyErnie(json.loads((folder / "config.json").read_bytes()))
    load_named(model, load_file(folder / "model.safetensors"))
    return model


@torch.no_grad()
def load_named(model: TinyErnie, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors with the checkpoint's names into the model. Raises KeyError for one that is missing."""
    for name, target in _named(model):
        target.copy_(tensors[name])


def _named(model: TinyErnie) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, tensor or view of the model); stacked experts one by one."""
    for name, tensor in model.state_dict().items():
        before, _, last = name.rpartition(".")
        if last in _STACKED:
            for index, expert in enumerate(tensor):
                yield f"model.{before}.{index}.{last}.weight", expert
        else:
            yield f"model.{name}", tensor
