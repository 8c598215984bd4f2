"""Trains the embedded model: `python -m engine.tiny.train --out DIR [--resume] [--minutes 90] [--seed 0]`.

DIR gets state.safetensors (to resume from), log.jsonl (losses, held-out accuracy) and, at the end, checkpoint/. With
--steps the same seed gives the same losses on the same machine; with --minutes the rates follow the clock.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine.tiny.training.run import Run
from engine.tiny.training.settings import Budget, Settings


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises SystemExit for arguments that are not understood."""
    parser = argparse.ArgumentParser(prog="python -m engine.tiny.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--minutes", type=float, default=90.0, help="all sessions of the run together; 0 only exports")
    parser.add_argument("--steps", type=int, help="instead of minutes: reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the run has threads of its own
    settings, device = Settings(seed=given.seed), torch.device(given.device)
    if given.resume:
        run = Run.resume(given.out, settings, device)
    else:
        if (given.out / "state.safetensors").exists():
            parser.error(f"{given.out} holds a run already: add --resume, or give another folder")
        run = Run.start(given.out, settings, device)
    run.train(Budget(steps=given.steps) if given.steps is not None else Budget(minutes=given.minutes))


if __name__ == "__main__":
    main()
