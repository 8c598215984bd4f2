"""What the sampler must do, said in plain float64, one row at a time, with full sorts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.request import SamplingParams

Row = npt.NDArray[np.float64]


def adjusted_logits(
    logits: Row, params: SamplingParams, prompt: tuple[int, ...], outputs: tuple[int, ...], eos: tuple[int, ...]
) -> Row:
    """Penalties, logit_bias, allowed tokens, bad words, bans before min_tokens."""
    x = logits.copy()
    for token in set(prompt) | set(outputs):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(outputs):
        x[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        if token < x.size:
            x[token] += bias
    if params.allowed_token_ids:
        x[np.isin(np.arange(x.size), params.allowed_token_ids, invert=True)] = -np.inf
    for *before, last in params.bad_token_sequences:
        if tuple(before) == outputs[len(outputs) - len(before) :] and max(*before, last, 0) < x.size:
            x[last] = -np.inf
    if len(outputs) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else eos)):
            if token < x.size:
                x[token] = -np.inf
    return x


def probabilities(adjusted: Row, params: SamplingParams) -> Row:
    """Temperature, top_k, top_p, min_p; equal probabilities rank by id."""
    top = adjusted.max()
    if top == -np.inf:  # nothing is left: token 0
        return np.eye(1, adjusted.size)[0]
    weights: Row = np.asarray(np.exp((adjusted - top) / params.temperature), dtype=np.float64)
    order = np.argsort(-weights, kind="stable")
    if params.top_k > 0:
        weights[order[params.top_k :]] = 0.0
    if params.top_p < 1.0:
        before = np.concatenate(([0.0], np.cumsum(weights[order])[:-1]))
        weights[order[before >= params.top_p * weights.sum()]] = 0.0
    weights[weights < params.min_p * weights.max()] = 0.0
    weights /= weights.sum()
    return weights


def choose(probability: Row, noise: float) -> int:
    """Inverse CDF in the order of the vocabulary."""
    return int(np.searchsorted(np.cumsum(probability), noise * probability.sum(), side="right"))


def log_softmax(logits: Row) -> Row:
    """At temperature 1."""
    shifted: Row = np.asarray(logits - logits.max(), dtype=np.float64)
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
