"""A training run: life cycle, and what makes it resumable.

1. The tokenizer is trained on examples and kept in the run's folder.
2. Each step draws examples that depend on (seed, step, most_pairs, shares) alone, so there is no position in a stream.
3. Forward and backward per micro-batch, one update, the routers' biases move by the sign of their load's error.
4. Every `eval_steps` held-out questions are asked: skills that lag get larger shares, and lists that are understood
   become longer.
5. Every `save_steps` everything is written to state.safetensors, in one rename; `Run.resume` goes on bit-equally.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.tiny.skills import (
    CHAT_TEMPLATE,
    MAX_PAIRS,
    SKILLS,
    TRAINING_MIX,
    held_out,
    held_out_lookups,
    segments,
    training_examples,
)
from engine.tiny.training.batches import IGNORED, MicroBatch, Tokens, encode, micro_batches, take
from engine.tiny.training.export import replace_checkpoint
from engine.tiny.training.measures import accuracy_by_skill, measure
from engine.tiny.training.model import TinyErnie
from engine.tiny.training.optimizer import Optimizer
from engine.tiny.training.settings import Settings
from engine.tiny.training.tokenizer import train_tokenizer

_STATE, _TOKENIZER, _LOG = "state.safetensors", "tokenizer.json", "log.jsonl"
_VOCAB_PADDED_TO = 16
_MAX_GRADIENT = 1.0
FIRST_PAIRS = 6
_UNDERSTOOD = 0.8  # of the questions
_LOG_STEPS = 10
# held-out skill -> the part of the training mix that teaches it, where the names differ
_TAUGHT_BY = {
    "tool-call": "tools",
    "tool-result": "tools",
    "lookup-16": "lookup",
    "lookup-100": "lookup",
    "lookup-200": "lookup",
}


@dataclass(kw_only=True)
class Progress:
    """Where a run stands. `shares`: of the training mix, by skill. `most_pairs`: of a list to look something up in."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    most_pairs: int = FIRST_PAIRS
    shares: dict[str, float] = field(default_factory=lambda: {name: part.share for name, part in TRAINING_MIX.items()})


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Of all micro-batches of a step: trained tokens, those of them with a second next one, all tokens."""

    rows: int
    second: int
    tokens: int

    @classmethod
    def of(cls, batches: list[MicroBatch]) -> StepSize:
        """Their sums."""
        return cls(
            rows=sum(batch.rows.numel() for batch in batches),
            second=sum(int((batch.second_targets != IGNORED).sum()) for batch in batches),
            tokens=sum(batch.packed.tokens.numel() for batch in batches),
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one micro-batch gives to a step. `load` int64 [MoE layers, experts]."""

    gradients: tuple[Tensor, ...]
    loss: float
    second_loss: float
    load: Tensor


class Run:
    """One run in a folder. `Run.start` begins one, `Run.resume` goes on with it."""

    def __init__(self, folder: Path, settings: Settings, device: torch.device, tokenizer: Tokenizer) -> None:
        self._folder, self._settings, self._tokenizer, self._device = folder, settings, tokenizer, device
        size = tokenizer.get_vocab_size()
        padded = -(-size // _VOCAB_PADDED_TO) * _VOCAB_PADDED_TO
        self.config: dict[str, Any] = {**settings.shape, "vocab_size": padded}
        torch.manual_seed(settings.seed)
        self.model = TinyErnie(self.config).to(device)
        self._optimizer = Optimizer(
            self.model,
            matrix_rate=settings.matrix_rate,
            other_rate=settings.other_rate,
            weight_decay=settings.weight_decay,
        )
        self.progress = Progress()
        # Micro-batches side by side, each on one core: two threads inside an operation wait for each other all the
        # time on a machine that others use too. Gradients are added in the order of the micro-batches, so results
        # don't depend on the number of threads.
        self._pool = ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))
        self._questions: list[Tokens] = []

    @classmethod
    def start(cls, folder: Path, settings: Settings, device: torch.device) -> Run:
        """Train the tokenizer, draw the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        examples = itertools.islice(training_examples(_seed(settings.seed, -1)), settings.tokenizer_examples)
        texts = (text for example in examples for text, _ in segments(example))
        tokenizer = train_tokenizer(texts, settings.vocab_size)
        tokenizer.save(str(folder / _TOKENIZER))
        return cls(folder, settings, device, tokenizer)

    @classmethod
    def resume(cls, folder: Path, settings: Settings, device: torch.device) -> Run:
        """Go on where the folder's last state stands. Raises ValueError if there is none."""
        if not (folder / _STATE).is_file():
            raise ValueError(f"{folder} holds no {_STATE}: nothing to resume")
        run = cls(folder, settings, device, Tokenizer.from_file(str(folder / _TOKENIZER)))
        with safe_open(folder / _STATE, framework="pt") as file:
            run.progress = Progress(**json.loads(file.metadata()["progress"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        run.model.load_state_dict({name[6:]: one for name, one in tensors.items() if name.startswith("model.")})
        run._optimizer.load_state(tensors)
        return run

    def save(self) -> None:
        """Write the state; a killed process leaves the last one whole."""
        tensors = {
            f"model.{name}": tensor for name, tensor in self.model.state_dict().items()
        } | self._optimizer.state()
        new = self._folder / f"{_STATE}.new"
        save_file(tensors, new, metadata={"progress": json.dumps(vars(self.progress))})
        new.replace(self._folder / _STATE)

    def train(self, minutes: float | None = None) -> list[float]:
        """Step until the run is done, or for so many minutes; then measure, save and export. Returns the losses."""
        losses = self.train_steps(None, minutes)
        self.evaluate()
        self.save()
        self.export()
        return losses

    def train_steps(self, at_most: int | None, minutes: float | None = None) -> list[float]:
        """Up to so many steps of the run, begun within so many minutes (None: no limit). Returns their losses."""
        settings, progress = self._settings, self.progress
        losses: list[float] = []
        started, before = time.monotonic(), progress.elapsed_s
        logged_s, logged_tokens = progress.elapsed_s, progress.num_tokens
        while (done := settings.progress(progress.num_tokens)) < 1.0 and len(losses) != at_most:
            if minutes is not None and progress.elapsed_s - before >= 60 * minutes:
                break
            figures = self._step(done)
            losses.append(figures["loss"])
            progress.step += 1
            progress.elapsed_s = before + time.monotonic() - started
            if progress.step % _LOG_STEPS == 0:
                rate = (progress.num_tokens - logged_tokens) / (progress.elapsed_s - logged_s)
                logged_s, logged_tokens = progress.elapsed_s, progress.num_tokens
                self._log({**figures, "progress": done, "tokens_per_s": rate})
            if progress.step % settings.eval_steps == 0:
                self.evaluate()
            if progress.step % settings.save_steps == 0:
                self.save()
        return losses

    def export(self) -> None:
        """Write `checkpoint/` in the run's folder: what serving loads."""
        replace_checkpoint(self._folder / "checkpoint", self.model, self.config, self._tokenizer, CHAT_TEMPLATE)

    def evaluate(self) -> None:
        """Ask held-out questions, log what came out, and give larger shares to what lags."""
        questions = self._held_out()
        measured = measure(self.model, questions)
        accuracy = accuracy_by_skill(questions, measured.correct)
        fair = measured.counts.sum(1, keepdim=True) / measured.counts.shape[1]
        loads = measured.counts / fair
        most_pairs = self.progress.most_pairs
        right = self._right_in_lists(most_pairs)
        self._log(
            {
                "accuracy": {skill: round(value, 3) for skill, value in accuracy.items()},
                "least_load": float(loads.min()),
                "greatest_load": float(loads.max()),
                "mtp_agreement": measured.agreement,
                "most_pairs": most_pairs,
                "right_in_lists": right,
            }
        )
        self._shift_shares(accuracy)
        if right >= _UNDERSTOOD:
            self.progress.most_pairs = min(MAX_PAIRS, 2 * most_pairs)

    def _right_in_lists(self, num_pairs: int) -> float:
        """Share of questions about that many pairs that are answered."""
        count = self._settings.eval_questions
        lists = [encode(example, self._tokenizer) for example in held_out_lookups(num_pairs, count)]
        return sum(measure(self.model, lists).correct) / max(1, count)

    def _shift_shares(self, accuracy: dict[str, float]) -> None:
        """Half a skill's share where every answer was right, one and a half where none was."""
        for name, part in TRAINING_MIX.items():
            found = [value for skill, value in accuracy.items() if _TAUGHT_BY.get(skill, skill) == name]
            if found:
                self.progress.shares[name] = part.share * (1.5 - sum(found) / len(found))

    def _step(self, done: float) -> dict[str, float]:
        settings, progress = self._settings, self.progress
        examples = training_examples(_seed(settings.seed, progress.step), progress.most_pairs, progress.shares)
        sequences = take(examples, self._tokenizer, num_tokens=settings.step_tokens, max_length=settings.max_length)
        batches = micro_batches(sequences, settings.micro_tokens)
        size = StepSize.of(batches)
        parts = self._pool.map(lambda batch: self._backward(batch.to(self._device), size), reversed(batches))
        loss, second, load = 0.0, 0.0, torch.zeros((), device=self._device)
        parameters = list(self.model.parameters())
        for part in parts:
            loss, second, load = loss + part.loss, second + part.second_loss, load + part.load
            for parameter, gradient in zip(parameters, part.gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT))
        scale = _rate(progress.step, done, settings)
        self._optimizer.step(scale, progress.step, self._pool)
        self.model.zero_grad()
        self._move_biases(load, scale)
        progress.num_tokens += size.tokens
        return {"loss": loss, "second_loss": second, "gradient": norm, "rate": scale}

    def _backward(self, batch: MicroBatch, size: StepSize) -> Part:
        """One micro-batch's part of the step; runs beside others, so it leaves nothing at the model."""
        settings = self._settings
        predictions = self.model(batch.packed, batch.rows)
        next_loss = cross_entropy(predictions.next, batch.targets, reduction="sum") / size.rows
        second_loss = cross_entropy(
            predictions.second, batch.second_targets, reduction="sum", ignore_index=IGNORED
        ) / max(size.second, 1)
        balance = torch.stack(predictions.loads.balance).mean() * len(batch.packed.tokens) / size.tokens
        total = next_loss + settings.second_weight * second_loss + settings.balance_weight * balance
        gradients = torch.autograd.grad(total, list(self.model.parameters()))
        return Part(
            gradients=gradients,
            loss=next_loss.item(),
            second_loss=second_loss.item(),
            load=torch.stack(predictions.loads.counts),
        )

    @torch.no_grad()
    def _move_biases(self, load_LE: Tensor, scale: float) -> None:
        """Loss-free balancing (Wang et al., 2024, arXiv 2408.15664): towards experts with less than the mean load."""
        for layer, load_E in zip(self.model.moe_layers, load_LE, strict=True):
            error = torch.sign(load_E.mean() - load_E)
            layer.moe_statics.e_score_correction_bias += self._settings.bias_rate * scale * error

    def _held_out(self) -> list[Tokens]:
        """Encoded once."""
        if not self._questions:
            count = self._settings.eval_questions
            found: Iterator[Tokens] = (
                encode(example, self._tokenizer) for skill in SKILLS for example in held_out(skill, count)
            )
            self._questions = [tokens for tokens in found if len(tokens.ids) <= self._settings.eval_length]
        return self._questions

    def _log(self, figures: dict[str, Any]) -> None:
        progress = self.progress
        place = {"step": progress.step, "tokens": progress.num_tokens, "minutes": progress.elapsed_s / 60}
        with (self._folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**place, **figures}) + "\n")


def _rate(step: int, done: float, settings: Settings) -> float:
    """Warm-up, a plateau, then a straight line to 0."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return warm * min(1.0, (1 - done) / settings.decay)


def _seed(seed: int, step: int) -> int:
    """Another one for every step and run."""
    return random.Random(f"neap tiny {seed} {step}").getrandbits(48)
