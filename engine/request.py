"""What a request asks of the engine: sampling parameters, their validation, and how a request may end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 8
MAX_STOP_BYTES = 256
MAX_CHOICES = 8
MAX_BAD_WORDS = 64
MAX_BAD_SEQUENCES = 2 * MAX_BAD_WORDS  # a word alone, and after a space
MAX_BAD_SEQUENCE_TOKENS = 32
MAX_ALLOWED_TOKEN_IDS = 32768
SEED_BITS = 63


class FinishReason(StrEnum):
    """Why a request produced its last token. ABORT covers cancels, deadlines and failures."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Immutable; construction validates.

    Raises ValueError naming the field for any value outside its range (NaN and infinities included).

    temperature 0 is greedy. top_k 0 (or -1) and top_p 1 and min_p 0 switch that filter off. `seed` None means that
    whoever admits the request draws one (one per choice). `max_tokens` None means "up to the model's context".
    `logprobs` is the number of alternatives per token (0: only the sampled token's), None for none.
    Filters apply in the order: penalties, logit_bias, allowed_token_ids, bad words, min_tokens mask, temperature,
    top_k, top_p, min_p.

    `bad_words` are texts; whoever has the tokenizer puts their tokens into `bad_token_sequences`, and the sampler never
    completes one of those among the outputs. `allowed_token_ids` empty allows every token; where nothing is left, token
    0 comes. `prompt_logprobs` is like `logprobs`, for the prompt's tokens from the second on (the prefix cache is then
    not read). `truncate_prompt_tokens` keeps that many tokens of the prompt's end (-1: what leaves room for an answer);
    it is for whoever makes the tokens, the engine does not look at it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name in ("stop_token_ids", "bad_words", "allowed_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.bad_token_sequences:
            object.__setattr__(self, "bad_token_sequences", tuple(map(tuple, self.bad_token_sequences)))
        self._check_numbers()
        self._check_lists()
        if self.bad_words or self.bad_token_sequences or self.allowed_token_ids:
            self._check_restrictions()

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is not either; the text is made only where it is wanted
                _check(False, name, value, f"a number in [{low:g}, {high:g}]")
        _check(self.top_p > 0, "top_p", self.top_p, "above 0")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(1 <= self.n <= MAX_CHOICES, "n", self.n, f"in [1, {MAX_CHOICES}]")
        _check(-1 <= self.top_k <= 1 << 30, "top_k", self.top_k, "-1, 0 or positive")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            "<= max_tokens",
        )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"in [0, {MAX_LOGPROBS}]")
        keep = self.truncate_prompt_tokens
        _check(keep is None or keep == -1 or keep >= 1, "truncate_prompt_tokens", keep, "-1 or at least 1")
        _check(self.seed is None or 0 <= self.seed < 1 << SEED_BITS, "seed", self.seed, f"in [0, 2**{SEED_BITS})")

    def _check_lists(self) -> None:
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _check(0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES, "stop", text[:40], "1..256 bytes")
        _check(len(self.stop_token_ids) <= 64, "stop_token_ids", len(self.stop_token_ids), "at most 64 ids")
        _check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS} ids"
        )
        for token, bias in self.logit_bias.items():
            _check(token >= 0, "logit_bias", token, "keyed by token ids")
            _check(math.isfinite(bias) and -100 <= bias <= 100, "logit_bias", bias, "in [-100, 100]")

    def _check_restrictions(self) -> None:
        _check(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", len(self.bad_words), f"at most {MAX_BAD_WORDS} words")
        for word in self.bad_words:
            _check(isinstance(word, str) and bool(word.strip()), "bad_words", word, "words, not empty texts")
        sequences = self.bad_token_sequences
        _check(
            len(sequences) <= MAX_BAD_SEQUENCES, "bad_words", len(sequences), f"at most {MAX_BAD_SEQUENCES} sequences"
        )
        for ids in sequences:
            _check(
                1 <= len(ids) <= MAX_BAD_SEQUENCE_TOKENS,
                "bad_words",
                len(ids),
                f"1..{MAX_BAD_SEQUENCE_TOKENS} tokens each",
            )
            _check(min(ids) >= 0, "bad_words", min(ids), "token ids")
        allowed = self.allowed_token_ids
        _check(
            len(allowed) <= MAX_ALLOWED_TOKEN_IDS,
            "allowed_token_ids",
            len(allowed),
            f"at most {MAX_ALLOWED_TOKEN_IDS} ids",
        )
        _check(not allowed or min(allowed) >= 0, "allowed_token_ids", min(allowed, default=0), "token ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without noise."""
        return self.temperature == 0.0

    @property
    def uses_penalties(self) -> bool:
        """Whether token counts of this request are needed."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
