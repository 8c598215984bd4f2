"""A router on the virtual clock: the real dispatcher, links that reconnect, and clients that check what they get."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Protocol

import msgspec

from cluster.router.decision import Decision
from cluster.router.dispatch import Dispatcher
from cluster.router.effects import Deliver, DeliverScores, DropLink, Ended, RouterEffect, Submit, ToWorker
from cluster.router.policies import policy_named
from cluster.sim.clock import VirtualClock
from cluster.sim.network import Connection, End, Network
from cluster.sim.process import SimProcess
from cluster.sim.worker import SimWorker
from cluster.types import Dispatch, Entry, Heartbeat, Path, WorkerInfo

RECONNECT_S = 0.2


class SimResult(msgspec.Struct, kw_only=True):
    """What a client got. `code` None with `ended_at` set: every choice finished."""

    submit: Submit
    outputs: dict[int, list[int]] = {}
    scores: list[float] = []  # prompt logprobs, from the second token on
    paths: list[Path] = []
    code: str | None = None
    first_token_at: float | None = None
    submitted_at: float = 0.0
    ended_at: float | None = None
    cancelled_at: float | None = None

    @property
    def live(self) -> bool:
        """Neither ended nor cancelled."""
        return self.ended_at is None and self.cancelled_at is None


class RouterWorld(Protocol):
    """What a router needs of the cluster around it."""

    clock: VirtualClock
    network: Network

    def find_worker(self, worker_id: str) -> SimWorker | None:
        """The worker that the registry names, dead or alive, if there is one."""
        ...

    def on_router_effect(self, router: SimRouter, effect: RouterEffect) -> None:
        """A router is about to perform an effect: for the journal, and for whoever checks the history."""
        ...


class SimRouter:
    """One router with its clients."""

    def __init__(
        self, world: RouterWorld, router_id: str, *, policy: str, rng: Random, keep_decisions: bool = True
    ) -> None:
        self.router_id = router_id
        self.num_live = 0  # requests that have neither ended nor been cancelled
        self.speaker = ""  # the incarnation whose message is being handled
        self._keep_decisions = keep_decisions
        self._world = world
        self.process = SimProcess(world.clock, router_id)
        self.dispatcher = Dispatcher(policy_named(policy), rng)
        self.results: dict[str, SimResult] = {}
        self.decisions: list[Decision] = []  # every placement, unlike the dispatcher's own, which are the last ones
        self._links: dict[str, Connection] = {}
        self._linked: dict[str, str] = {}
        self._num_links = 0
        self._wake_up_at = float("inf")

    # ---- clients

    def submit(self, submit: Submit) -> None:
        """A client's request, validated and tokenised."""
        self.results[submit.request_id] = SimResult(submit=submit, submitted_at=self._world.clock.now)
        self.num_live += 1
        self.process.post(self._submit, submit)

    def _submit(self, submit: Submit) -> None:
        self._do(self.dispatcher.on_submit(self._world.clock.now, submit))

    def cancel(self, request_id: str) -> None:
        """The client goes away; the router notices when it runs."""
        self.process.post(self._cancel, request_id)

    def _cancel(self, request_id: str) -> None:
        result = self.results[request_id]
        if result.live:
            result.cancelled_at = self._world.clock.now
            self.num_live -= 1
        self._do(self.dispatcher.on_cancel(self._world.clock.now, request_id))

    # ---- links

    def connect(self, worker_id: str) -> None:
        """Connect to a worker, and again for as long as there is none."""
        if not self.process.alive or worker_id in self._links:
            return
        worker = self._world.find_worker(worker_id)
        if worker is None:
            self._connect_later(worker_id)
            return
        self._num_links += 1
        link_id = f"{self.router_id}#{self._num_links}"
        here = End(
            process=self.process,
            on_message=partial(self._from_worker, worker_id, worker.incarnation),
            on_closed=partial(self._down, worker_id),
        )
        connection = self._world.network.connect(here, worker.accept_link(link_id))
        self._links[worker_id] = connection
        self._linked[worker_id] = worker.incarnation
        worker.welcome(link_id, connection)

    def break_link(self, worker_id: str) -> None:
        """The network breaks the link, if there is one; both ends live on."""
        if (link := self._links.get(worker_id)) is not None:
            link.cut()

    def link(self, worker_id: str) -> Connection | None:
        """The link to a worker, standing or being made."""
        return self._links.get(worker_id)

    def linked_to(self, worker_id: str) -> str:
        """The incarnation that the newest link to a worker was made to; "" if there was none."""
        return self._linked.get(worker_id, "")

    def _connect_later(self, worker_id: str) -> None:
        self.process.at(self._world.clock.now + RECONNECT_S, self.connect, worker_id)

    def _down(self, worker_id: str) -> None:
        self._links.pop(worker_id, None)
        self._do(self.dispatcher.on_worker_down(self._world.clock.now, worker_id))
        self._connect_later(worker_id)

    def _from_worker(
        self, worker_id: str, incarnation: str, message: WorkerInfo | Heartbeat | tuple[Entry, ...]
    ) -> None:
        now, self.speaker = self._world.clock.now, incarnation
        if isinstance(message, tuple):
            self._do(self.dispatcher.on_entries(now, worker_id, message))
        elif isinstance(message, Heartbeat):
            self._do(self.dispatcher.on_heartbeat(now, message))
        else:
            self._do(self.dispatcher.on_worker_up(now, message))

    # ---- effects

    def _do(self, effects: Iterable[RouterEffect]) -> None:
        for effect in effects:
            self._world.on_router_effect(self, effect)
            self._perform(effect)
        at = self.dispatcher.next_timer()
        if at is not None and at < self._wake_up_at:
            self._arm(at)

    def _arm(self, at: float) -> None:
        self._wake_up_at = at
        self.process.at(at, self._wake_up, at)

    def _wake_up(self, at: float) -> None:
        if self._wake_up_at == at:
            self._wake_up_at = float("inf")
        due = self.dispatcher.next_timer()
        if due is not None and due <= self._world.clock.now:
            self._do(self.dispatcher.on_timer(self._world.clock.now))
        elif due is not None and due < self._wake_up_at:
            self._arm(due)

    def _perform(self, effect: RouterEffect) -> None:
        if isinstance(effect, Deliver):
            self._deliver(effect)
        elif isinstance(effect, ToWorker):
            if self._keep_decisions and isinstance(effect.message, Dispatch):
                self.decisions += self.dispatcher.chooser.decisions(effect.message.request_id)[:1]
            if (link := self._links.get(effect.worker_id)) is not None:
                # the outbox sends aborts and releases before dispatches (cluster/rpc/outbox.py)
                link.send(0, effect.message, urgent=not isinstance(effect.message, Dispatch))
        elif isinstance(effect, Ended):
            result = self.results[effect.request_id]
            assert result.live, f"{effect.request_id} ends twice, or after it was cancelled"
            result.code, result.ended_at = effect.code, self._world.clock.now
            self.num_live -= 1
        elif isinstance(effect, DeliverScores):
            self._deliver_scores(effect)
        elif isinstance(effect, DropLink):
            if (link := self._links.pop(effect.worker_id, None)) is not None:
                link.close(0)
            self._connect_later(effect.worker_id)

    def _deliver(self, effect: Deliver) -> None:
        tokens = effect.tokens
        result = self.results[tokens.request_id]
        assert result.live, f"tokens of {tokens.request_id} after its end"
        outputs = result.outputs.setdefault(tokens.choice, [])
        assert tokens.position == len(outputs), f"{tokens.request_id} choice {tokens.choice}: a hole in the text"
        outputs.extend(tokens.token_ids)
        if result.first_token_at is None:
            result.first_token_at = self._world.clock.now
        if effect.path is not None:
            result.paths.append(effect.path)

    def _deliver_scores(self, effect: DeliverScores) -> None:
        scores = effect.scores
        result = self.results[scores.request_id]
        assert result.live and not result.outputs, f"prompt logprobs of {scores.request_id} after its first token"
        assert scores.first_position == len(result.scores) + 1, f"{scores.request_id}: a hole in its prompt logprobs"
        result.scores += [entry.logprob for entry in scores.logprobs]
