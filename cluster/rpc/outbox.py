"""The two bounded outboxes of a link. Pure: they hold what waits to be written and say when it is too much.

router -> worker   aborts and releases overtake dispatches; an abort removes the dispatch that it overtakes; what waits
                   leaves together
worker -> router   entries of one request melt together while they wait, so a slow reader costs memory, not messages
"""

from __future__ import annotations

from collections import deque

import msgspec

from cluster.types import AbortRequest, CacheNews, Dispatch, Entry, News, PromptScores, RouterMessage, Tokens

MAX_DISPATCH_BYTES = 64 << 20
MAX_MESSAGES = 8192
# batches of entries that a router may have before it: gRPC alone would keep a second's worth of tokens, one message per
# step, for a router that lags, where melted together they are taken in a moment
MAX_UNTAKEN = 4
TAKEN_EVERY = 2  # the router says so after this many
MAX_BATCH = 256
MAX_BATCH_BYTES = 256 << 10
_KEYS_PER_TOKEN = 256  # bytes of cache news that weigh as much as one token
_MESSAGE_BYTES = 256  # what a message weighs beside its tokens


def _weight(message: RouterMessage) -> int:
    if not isinstance(message, Dispatch):
        return _MESSAGE_BYTES
    return _MESSAGE_BYTES + len(message.prompt) + sum(len(choice.outputs) for choice in message.choices)


class RouterOutbox:
    """What a router has to tell one worker."""

    def __init__(self) -> None:
        self._urgent: deque[AbortRequest | RouterMessage] = deque()
        self._dispatches: dict[tuple[str, int], Dispatch] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._dispatches)

    @property
    def is_over(self) -> bool:
        """Whether the worker takes so little that its link should be broken."""
        return self._num_bytes > MAX_DISPATCH_BYTES or len(self) > MAX_MESSAGES

    def put(self, message: RouterMessage) -> None:
        """Queue a message."""
        key = (message.request_id, message.attempt)
        if isinstance(message, Dispatch):
            self._dispatches[key] = message
        elif isinstance(message, AbortRequest) and key in self._dispatches:
            self._num_bytes -= _weight(self._dispatches.pop(key))
            return
        else:
            self._urgent.append(message)
        self._num_bytes += _weight(message)

    def take_some(self) -> list[RouterMessage]:
        """The next messages to write in one: a bounded number and size of them, so that an abort never waits long."""
        messages: list[RouterMessage] = []
        left = MAX_BATCH_BYTES
        while left > 0 and len(messages) < MAX_BATCH and (message := self.take()) is not None:
            messages.append(message)
            left -= _weight(message)
        return messages

    def take(self) -> RouterMessage | None:
        """The next message to write."""
        if self._urgent:
            message = self._urgent.popleft()
        elif self._dispatches:
            message = self._dispatches.pop(next(iter(self._dispatches)))
        else:
            return None
        self._num_bytes -= _weight(message)
        return message


class WorkerOutbox:
    """What a worker has to tell one router."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: list[Entry] = []
        self._last: dict[tuple[str, int, int], int] = {}  # (request, attempt, choice; -1 news, -2 prompt) -> index
        self._weight = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_over(self) -> bool:
        """Whether the router reads so little that its link should be broken."""
        return self._weight > self._max_tokens

    def put(self, entry: Entry) -> None:
        """Queue an entry, melted into the one of the same choice where that says the same in one piece."""
        choice = entry.choice if isinstance(entry, Tokens) else -2 if isinstance(entry, PromptScores) else -1
        key = (entry.request_id, entry.attempt, choice)
        index = self._last.get(key)
        if index is not None:
            melted = _melt(self._entries[index], entry)
            if melted is not None:
                self._weight += _entry_weight(melted) - _entry_weight(self._entries[index])
                self._entries[index] = melted
                return
        self._last[key] = len(self._entries)
        self._entries.append(entry)
        self._weight += _entry_weight(entry)

    def take(self) -> tuple[Entry, ...]:
        """Everything that waits, as one message's entries."""
        entries = tuple(self._entries)
        self._entries, self._last, self._weight = [], {}, 0
        return entries


def _entry_weight(entry: Entry) -> int:
    if isinstance(entry, CacheNews):
        return 1 + (len(entry.stored) + len(entry.evicted)) // _KEYS_PER_TOKEN
    if isinstance(entry, PromptScores):
        return 1 + len(entry.logprobs)
    return 1 + len(entry.token_ids) if isinstance(entry, Tokens) else 1


def _melt(before: Entry, after: Entry) -> Entry | None:
    """One entry for two, or None where they must stay two."""
    if isinstance(before, News) and isinstance(after, News):
        return after
    if not isinstance(before, Tokens) or not isinstance(after, Tokens) or before.finish_reason is not None:
        return None
    if after.position != before.position + len(before.token_ids):
        return None
    if len(before.logprobs) not in (0, len(before.token_ids)) or bool(before.logprobs) != bool(after.logprobs):
        return None
    return msgspec.structs.replace(
        before,
        token_ids=before.token_ids + after.token_ids,
        logprobs=before.logprobs + after.logprobs,
        finish_reason=after.finish_reason,
        stop_token=after.stop_token,
        num_cached_tokens=max(before.num_cached_tokens, after.num_cached_tokens),
        path=before.path or after.path,
    )
