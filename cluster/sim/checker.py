"""The history checker: what must hold of every run, whatever went wrong in it.

1. Every admitted request ends exactly once, with the oracle's text or an error that the faults justify (`_justified`);
   what was delivered before an error, a cancel or the router's death is a prefix of the oracle's text.
2. One (role, state) per worker, incarnation and epoch; epochs of an incarnation never go back. (It starts with the
   epoch that it is first ready with.)
3. No block with two owners (owners.py), no copy into a block that is somebody else's (copies.py).
4. Tokens are delivered only from the incarnation and attempt that the router dispatched to last.
5. A worker takes no dispatch of another incarnation or epoch and none twice, serves no call for another incarnation,
   begins no switch whose fences do not match; and refuses none of these that fits.
6. No piece is refused that was not spoiled (nor does a copy of one fail: corruption.py).
7. Who says that it has switched has: its rank runs in the new role, and a canary was awaited.
8. No router gives up a worker that no fault has hit, however late its own loop runs, nor sends anything to one whose
   engine it found standing and that has not moved since.
9. No command fails at a rank: the machines send none that makes no sense.
10. When all is over nobody holds anything (SimCluster.leaks), and the pools' counts agree with the shadow's.
11. All this was not idle: pieces were copied, and prefixes found in caches.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from cluster.errors import REFUSED
from cluster.router.effects import Deliver, DropLink, Ended, ToWorker
from cluster.sim.cluster import SimCluster
from cluster.sim.owners import BlockOwners
from cluster.sim.router import SimResult, SimRouter
from cluster.sim.worker import SimWorker
from cluster.types import Dispatch, Failed, FetchOpen, FetchRefused, SourceFailed, SwitchRequest, WorkerInfo
from cluster.worker.effects import Effect, Publish, SendEntry, SendFetch, SendSwitchReply, StartCopy
from engine.messages import Command

NO_WORKER_S = 10.0
FAR_S = 900.0  # deadlines beyond this are none
MANY_CALLS = 8


class Checker:
    """A watcher of one run. `violations` in words, the first ones first."""

    def __init__(self, spoiled_requests: Set[str] = frozenset()) -> None:
        self._spoiled_requests = spoiled_requests
        self.violations: list[str] = []
        self.num_checks = 0
        self._owners: dict[str, BlockOwners] = {}
        self.checks: dict[type, Callable[[SimWorker, Any], None]] = {  # 2; 3: the shadow learns of copies; 6, 7
            StartCopy: lambda worker, effect: self._owners[worker.incarnation].copy_started(effect),
            Publish: lambda worker, effect: self.on_info(effect.info),
            SendEntry: self._on_entry,
            SendSwitchReply: self._on_switch_reply,
        }
        self.router_checks: dict[type, Callable[[SimRouter, Any], None]] = {  # 4, 8
            Deliver: self._on_deliver,
            ToWorker: self._on_message,
            DropLink: self._on_given_up,
            Ended: self._on_ended,
        }
        self._workers: dict[str, SimWorker] = {}
        self._hung: dict[tuple[str, str], int] = {}  # (router, incarnation): the step at which its engine stood
        self._facts: dict[tuple[str, int], tuple[str, str]] = {}
        self._epochs: dict[str, int] = {}
        self._last: dict[str, tuple[str, str, int]] = {}  # request -> (router, incarnation, attempt) dispatched last
        self._ran_on: dict[str, set[str]] = {}  # request -> incarnations that it was dispatched to
        self._disturbed: set[str] = set()  # incarnations that died, stood still, or whose links broke

    def report(self, what: str) -> None:
        """Note a violation."""
        if len(self.violations) < 20:
            self.violations.append(what)

    def disturbed(self, incarnation: str) -> None:
        """A fault hit this worker: its links may break."""
        self._disturbed.add(incarnation)

    # ---- while it runs (Watcher)

    def on_worker(self, worker: SimWorker) -> None:
        """Watch its blocks and what it is asked."""
        self._owners[worker.incarnation] = BlockOwners(worker, self.report)
        self._workers[worker.incarnation] = worker
        self._watch_dispatches(worker)
        self._watch_calls(worker)
        self._watch_switches(worker)
        self._watch_rank(worker)

    def on_info(self, info: WorkerInfo) -> None:
        """2."""
        fact = (info.role, "ready" if info.state == "starting" else info.state)  # it was not known before
        if self._facts.setdefault((info.incarnation, info.epoch), fact) != fact:
            before = self._facts[info.incarnation, info.epoch]
            self.report(f"{info.worker_id} epoch {info.epoch} is {before} and {fact}")
        if info.epoch < self._epochs.get(info.incarnation, 0):
            self.report(f"{info.worker_id}: epoch {info.epoch} after {self._epochs[info.incarnation]}")
        self._epochs[info.incarnation] = info.epoch

    def _on_entry(self, worker: SimWorker, effect: SendEntry) -> None:
        failed = effect.entry
        if not isinstance(failed, SourceFailed) or failed.reason != "protocol":
            return
        if failed.request_id not in self._spoiled_requests:
            self.report(f"false alarm: {failed.request_id}: a piece was refused, nothing was wrong with it")

    def _on_switch_reply(self, worker: SimWorker, effect: SendSwitchReply) -> None:
        info = effect.reply.info
        before = self._facts.get((info.incarnation, info.epoch - 1), ("", ""))[1]
        fits = worker.core.scheduler.role == info.role and before == "verifying"
        if effect.reply.outcome == "switched" and not fits:
            self.report(f"{info.worker_id} says that it is a {info.role} worker after it was {before}")

    def copy_ended(self, incarnation: str, effect: StartCopy) -> None:
        """3: the copy has reported."""
        self._owners[incarnation].copy_ended(effect)

    def _on_deliver(self, router: SimRouter, effect: Deliver) -> None:
        self.num_checks += 1
        tokens = effect.tokens
        came = (router.router_id, router.speaker, tokens.attempt)
        if self._last.get(tokens.request_id) != came:
            self.report(f"{tokens.request_id}: tokens of {came}, dispatched to {self._last.get(tokens.request_id)}")

    def _on_message(self, router: SimRouter, effect: ToWorker) -> None:
        dispatch = effect.message
        if not isinstance(dispatch, Dispatch):
            return
        older = self._last.get(dispatch.request_id)
        if older is not None and older[2] >= dispatch.attempt:
            self.report(f"{dispatch.request_id}: attempt {dispatch.attempt} after {older[2]}")
        stood_at = self._hung.get((router.router_id, dispatch.incarnation))
        if stood_at is not None and self._workers[dispatch.incarnation].num_steps == stood_at:
            self.report(f"{dispatch.request_id} is sent to {effect.worker_id}, whose engine still stands")
        self._last[dispatch.request_id] = (router.router_id, dispatch.incarnation, dispatch.attempt)
        self._ran_on.setdefault(dispatch.request_id, set()).add(dispatch.incarnation)

    def _on_given_up(self, router: SimRouter, effect: DropLink) -> None:
        incarnation = router.linked_to(effect.worker_id)
        if "stood" in effect.reason:
            self._hung[router.router_id, incarnation] = self._workers[incarnation].num_steps
        if incarnation not in self._disturbed:
            self.report(f"{router.router_id} gives up {effect.worker_id}, which nothing hit: {effect.reason}")
        self._disturbed.add(incarnation)

    def _on_ended(self, router: SimRouter, effect: Ended) -> None:
        if effect.code == "internal_error":
            self.report(f"{effect.request_id} ends with internal_error: {effect.message}")

    def _watch_dispatches(self, worker: SimWorker) -> None:
        """5, of dispatches."""
        machine = worker.decode
        inner = machine.on_dispatch
        taken: set[tuple[str, int]] = set()

        def report(mine: WorkerInfo, dispatch: Dispatch, what: str) -> None:
            name = f"{mine.worker_id} (epoch {mine.epoch}, {mine.state}), {dispatch.request_id}/{dispatch.attempt}"
            self.report(f"{name}: {what}")

        def on_dispatch(now: float, link_id: str, dispatch: Dispatch) -> list[Effect]:
            mine = machine.info
            num_stale = machine.counters.get("stale_dispatches", 0)
            effects = inner(now, link_id, dispatch)
            self.num_checks += 1
            answers = [effect.entry for effect in effects if isinstance(effect, SendEntry)]
            codes = [entry.code for entry in answers if isinstance(entry, Failed)]
            fits = (dispatch.incarnation, dispatch.epoch) == (mine.incarnation, mine.epoch) and mine.state == "ready"
            stale = machine.counters.get("stale_dispatches", 0) > num_stale
            if not stale and fits == (REFUSED in codes):
                report(mine, dispatch, f"{'refused' if fits else 'taken'}, it names epoch {dispatch.epoch}")
            if fits and not codes and not stale:
                if (dispatch.request_id, dispatch.attempt) in taken:
                    report(mine, dispatch, "taken twice")
                taken.add((dispatch.request_id, dispatch.attempt))
            return effects

        machine.on_dispatch = on_dispatch  # type: ignore[method-assign]

    def _watch_calls(self, worker: SimWorker) -> None:
        """5, of calls."""
        machine = worker.prefill
        inner = machine.on_fetch

        def on_fetch(now: float, call: FetchOpen) -> list[Effect]:
            effects = inner(now, call)
            replies = [effect.reply for effect in effects if isinstance(effect, SendFetch)]
            refused = any(isinstance(reply, FetchRefused) and reply.code == "incarnation" for reply in replies)
            if refused == (call.source_incarnation == machine.info.incarnation):
                what = "refused" if refused else "served"
                self.report(
                    f"{machine.info.worker_id}: call {call.call_id} for {call.source_incarnation[:8]} is {what}"
                )
            return effects

        machine.on_fetch = on_fetch  # type: ignore[method-assign]

    def _watch_switches(self, worker: SimWorker) -> None:
        """5, of switches."""
        machine = worker.machine
        inner = machine.on_switch

        def on_switch(now: float, call_id: str, request: SwitchRequest) -> list[Effect]:
            mine = machine.info
            effects = inner(now, call_id, request)
            replies = [effect.reply for effect in effects if isinstance(effect, SendSwitchReply)]
            refused = any(reply.outcome == "refused" for reply in replies)
            fits = (request.incarnation, request.expected_epoch) == (mine.incarnation, mine.epoch)
            known = mine.state == "ready" and not any("canary" in reply.reason for reply in replies)
            if refused == (fits and known) and (refused or not fits):
                what = "refused" if refused else "taken"
                self.report(f"{mine.worker_id} (epoch {mine.epoch}): switch for {request.expected_epoch} is {what}")
            return effects

        machine.on_switch = on_switch  # type: ignore[method-assign]

    def _watch_rank(self, worker: SimWorker) -> None:
        """9."""
        core = worker.core
        inner = core._fail

        def fail(command: Command, error: Exception) -> None:
            name = f"{type(command).__name__} failed with {type(error).__name__}: {error}"
            self.report(f"{worker.info.worker_id}: {name}")
            inner(command, error)

        core._fail = fail  # type: ignore[method-assign]

    # ---- at the end

    def check_results(self, sim: SimCluster) -> None:
        """1."""
        for router in sim.routers:
            for name, result in router.results.items():
                self._check(sim, router, name, result)

    def _check(self, sim: SimCluster, router: SimRouter, name: str, result: SimResult) -> None:
        is_whole = result.ended_at is not None and result.code is None
        longest = max(map(len, result.outputs.values()), default=0)
        expected = sim.oracle(result.submit, at_most=None if is_whole else longest)
        self.num_checks += 1
        for choice, outputs in result.outputs.items():
            if outputs != expected[choice][: len(outputs)]:
                self.report(f"{name} choice {choice}: the text differs from the oracle's")
        if result.live:
            if router.process.alive:
                self.report(f"{name} never ends")
        elif is_whole:
            if result.outputs != expected:
                self.report(f"{name} ended well without its whole text")
        elif result.code is not None and not self._justified(name, result):
            self.report(f"{name} ends with {result.code}, which nothing explains")

    def _justified(self, name: str, result: SimResult) -> bool:
        """Which error may follow from what.

        deadline_exceeded   the client had set a deadline, and it has passed
        decode_worker_lost  two of the incarnations that it was at were hit by a fault
        no_worker           it found no decode worker for NO_WORKER_S, and some worker had been hit
        """
        assert result.ended_at is not None, "it has a code, so it has ended"
        if result.code == "deadline_exceeded":
            return result.submit.deadline < FAR_S and result.ended_at >= result.submit.deadline
        if result.code == "decode_worker_lost":
            return len(self._ran_on.get(name, set()) & self._disturbed) >= 2
        if result.code == "no_worker":
            return result.ended_at - result.submitted_at >= NO_WORKER_S and bool(self._disturbed)
        return False

    def check_use(self, num_pieces: int) -> None:
        """11. A few calls may all have been hit; a policy may leave nearly every prompt to the decode workers."""
        num_calls = sum(worker.prefill.counters["accepted"] for worker in self._workers.values())
        if num_calls >= MANY_CALLS and not num_pieces:
            self.report("not one piece was copied")
        if not any(worker.core.load().prefix_cache_hits for worker in self._workers.values()):
            self.report("nothing was ever found in a prefix cache")

    def check_leaks(self, sim: SimCluster) -> None:
        """10."""
        for leak in sim.leaks():
            self.report(f"leak: {leak}")
        for incarnation, worker in self._workers.items():
            counted, held = worker.core.scheduler.blocks.num_referenced, self._owners[incarnation].num_held
            if worker.process.alive and counted != held:
                self.report(f"{worker.info.worker_id} counts {counted} referenced blocks, {held} have a holder")
