"""What the scheduler's machine expects: requests and calls as the other side sees them, from the exact fake."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash

import engine.messages as m
from engine.fake_engine import ArrayMemory, FakeModel, spread
from engine.kv.block_manager import BlockManager
from engine.kv.prefix_cache import HashChain, root_key
from engine.scheduler.prefill import MAX_SCORED_PER_STEP

BLOCK = 16
MODEL = FakeModel(stop_probability=0.02)
BASES = [[3 + (i * i + 7 * k * i) % 200 for i in range(130)] for k in (1, 2)]


def tokens_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def kv_of(tokens: list[int]) -> np.ndarray:
    """uint8 [n, 2, 8]: the KV bytes of a sequence, position by position."""
    return spread(MODEL.chain(MODEL.root, tokens, 0), 2).view(np.uint8).reshape(len(tokens), 2, 8)


def keys_of(tokens: list[int]) -> list[bytes]:
    """The prefix cache's keys of a sequence's whole blocks."""
    return HashChain(root_key(MODEL.identity), BLOCK).hash_blocks(np.array(tokens, dtype=np.int32))


@dataclass
class Expected:
    """One request as its client sees it."""

    prompt: list[int]
    text: list[int]
    got: list[int]
    ended: bool = False
    pull_blocks: list[int] = field(default_factory=list)  # the block table while a pull is open
    landed: set[int] = field(default_factory=set)  # indices matched or committed
    wants_scores: bool = False
    scores: list[float] = field(default_factory=list)  # prompt logprobs, from the second token on
    add: m.Add | None = None
    num_held: int = -1  # tokens pinned while it is paused; -1: it runs

    def take_scores(self, message: m.PromptLogprobs) -> None:
        """In order, each once, before any token, and from the KV that is its own."""
        assert self.wants_scores and not self.ended
        assert message.first_position == len(self.scores) + 1 and 0 < len(message.logprobs) <= MAX_SCORED_PER_STEP
        self.scores += [entry.logprob for entry in message.logprobs]
        assert self.scores == MODEL.prompt_oracle(self.prompt)[: len(self.scores)]

    def copy(self, i: int, memory: ArrayMemory) -> int:
        """Land block i of a pull (the last token is never copied); returns how many tokens it holds."""
        tokens = self.prompt + self.got
        num = max(min(BLOCK, len(tokens) - 1 - i * BLOCK), 0)
        kv = kv_of(tokens)[i * BLOCK : i * BLOCK + num]
        memory.bytes6[self.pull_blocks[i], 0, :, 0, :num] = kv.transpose(1, 0, 2)
        return num

    def pinned(self, blocks: BlockManager) -> list[int]:
        """The blocks that a peer's Serve would match while it is paused: what Paused promised."""
        matched = blocks.match(keys_of((self.prompt + self.got)[: self.num_held]))
        assert len(matched) * BLOCK == self.num_held, "KV that Paused promised is gone"
        return matched

    def open_blocks(self) -> list[int]:
        """Indices that a copy may still write."""
        return [i for i in range(len(self.pull_blocks)) if i not in self.landed]


@dataclass
class Call:
    """One served call as its peer sees it."""

    kv: np.ndarray
    start: int
    end: int = -1
    next_block: int = 0
    pieces: list[m.ServedPiece] = field(default_factory=list)
    done: bool = False

    def see(self, reply: object) -> None:
        """News of this call: pieces come in order, and all of them before ServeDone."""
        if isinstance(reply, m.Serving):
            self.end = reply.end_tokens
        elif isinstance(reply, m.ServedPiece):
            assert reply.first_block == self.next_block and not self.done
            assert len(reply.block_ids) == len(reply.checksums) == -(-reply.end_tokens // BLOCK) - reply.first_block
            self.next_block += len(reply.block_ids)
            self.pieces.append(reply)
        elif isinstance(reply, m.ServeDone):
            self.done = True
            assert self.end <= self.start or self.next_block == -(-self.end // BLOCK)

    def check_pieces(self, memory: ArrayMemory) -> None:
        """What was offered is still there, and is the sequence's own KV."""
        for piece in self.pieces:
            for i, (block_id, checksum) in enumerate(zip(piece.block_ids, piece.checksums, strict=True)):
                first = (piece.first_block + i) * BLOCK
                want = self.kv[first : min(first + BLOCK, piece.end_tokens)].transpose(1, 0, 2)
                have = memory.partial(block_id, want.shape[1])[0, :, 0]
                assert np.array_equal(have, want), "an offered block was overwritten while it was pinned"
                assert checksum == xxhash.xxh3_64_intdigest(np.ascontiguousarray(have).data)
