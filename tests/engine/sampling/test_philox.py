"""The generator against the published known answers, numpy's own Philox, and pure integers."""

from __future__ import annotations

import random

import pytest
import torch

from engine.sampling.philox import Purpose, philox4x32, uniform

MASK = 0xFFFFFFFF


def reference_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, which never overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def block(counter: list[int], key: list[int]) -> list[int]:
    words = [torch.tensor([word]) for word in (*counter, *key)]
    return [int(word) for word in philox4x32((words[0], words[1], words[2], words[3]), (words[4], words[5]))]


# Known answers of the generator's authors (Random123, kat_vectors, philox4x32 with 10 rounds).
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert block(counter, key) == expected
    assert reference_block(counter, key) == expected


def test_philox_equals_pure_integers_on_random_inputs() -> None:
    words = random.Random(0)
    for _ in range(200):
        counter, key = [words.getrandbits(32) for _ in range(4)], [words.getrandbits(32) for _ in range(2)]
        assert block(counter, key) == reference_block(counter, key)


def test_uniform_uses_seed_position_choice_and_purpose() -> None:
    seed, position, choice = (1 << 62) + 12345, (1 << 33) + 7, 3
    drawn = uniform(torch.tensor([seed]), torch.tensor([position]), torch.tensor([choice]), Purpose.TOKEN)
    words = reference_block([position & MASK, position >> 32, choice, int(Purpose.TOKEN)], [seed & MASK, seed >> 32])
    assert drawn.item() == ((words[0] << 21) | (words[1] >> 11)) / 2**53


def test_uniform_is_uniform_and_below_one() -> None:
    count = 100_000
    position, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    drawn = uniform(zeros + 42, position, zeros, Purpose.TOKEN)
    assert drawn.dtype == torch.float64 and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    histogram = torch.histc(drawn, bins=100, min=0, max=1)
    chi_square = float(((histogram - 1000) ** 2 / 1000).sum())
    assert chi_square < 160  # 99 degrees of freedom: beyond the 99.99th percentile


def test_an_element_does_not_depend_on_its_neighbours() -> None:
    seeds, positions = torch.arange(33) * 7919, torch.arange(33) + 5
    zeros = torch.zeros(33, dtype=torch.int64)
    together = uniform(seeds, positions, zeros, Purpose.TOKEN)
    alone = torch.cat([uniform(seeds[i : i + 1], positions[i : i + 1], zeros[:1], Purpose.TOKEN) for i in range(33)])
    assert torch.equal(together, alone)
