"""Trains the embedded model: `python -m engine.tiny.train --out DIR [--resume] [--minutes N] [--tokens N]`.

DIR gets state.safetensors (to resume from), log.jsonl (losses, held-out accuracy) and, at the end, checkpoint/.
The same seed gives the same losses on the same machine: rates follow tokens, --minutes only says when to pause.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine.tiny.training.run import Run
from engine.tiny.training.settings import Settings


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises SystemExit for arguments that are not understood."""
    parser = argparse.ArgumentParser(prog="python -m engine.tiny.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be resumed; 0 only measures and exports")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="length of the whole run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the run has threads of its own
    settings, device = Settings(seed=given.seed, tokens=given.tokens), torch.device(given.device)
    if given.resume:
        run = Run.resume(given.out, settings, device)
    else:
        if (given.out / "state.safetensors").exists():
            parser.error(f"{given.out} holds a run already: add --resume, or give another folder")
        run = Run.start(given.out, settings, device)
    run.train(given.minutes)


if __name__ == "__main__":
    main()
