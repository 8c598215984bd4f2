"""A cluster at the level of requests, on a virtual clock: machines, one router's placements, changes of roles.

    arrival -> placed -> computed by a source -> KV moved -> decoded                      (or all of it by one worker)
              |  no room: the router's queue, bounded; over it the request is refused (429), a miss

What it leaves out: prefix caches, block granularity, preemption (a seat reserves prompt and answer), a source's limits
on what it accepts, links shared by hand-offs, jitter. What it has in common with the product: profiles, chunking within
a step's bounds, placement by predicted cost, what becomes of requests when a role changes, the planner itself.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from cluster.bench.roles.figures import Requests
from cluster.bench.roles.machine import Job, Machine
from cluster.bench.roles.placement import Placed, Placer
from cluster.bench.roles.setting import Hardware, Setting
from engine.config import Role

AFTER_S = 150.0  # what is not over so long after the last arrival has missed its targets anyway


class Watcher(Protocol):
    """The one that decides about roles: hears what a router knows, asks for changes."""

    def on_request(self, now: float, job: Job) -> None: ...
    def on_first_token(self, now: float, job: Job) -> None: ...
    def on_end(self, now: float, job: Job) -> None: ...
    def on_beat(self, now: float, cluster: ClusterModel) -> None: ...
    def on_state(self, now: float, index: int, role: Role, state: str) -> None: ...


@dataclass(kw_only=True)
class _Switch:
    """A change under way. `leaving`: moved requests whose KV is still held here."""

    number: int
    role: Role
    began: float
    leaving: int = 0
    given: bool = False
    settling: bool = False


@dataclass(kw_only=True)
class Changes:
    """What the changes of a run were."""

    to_prefill: int = 0
    to_decode: int = 0
    moved: int = 0
    begun_again: int = 0
    rolled_back: int = 0
    busy_ms: float = 0.0  # of all changes together


class ClusterModel:
    """One run. `split`: how many of the workers, the first ones, prefill. `watcher` may call `switch`."""

    def __init__(
        self,
        setting: Setting,
        hardware: list[Hardware],
        split: int,
        *,
        watcher: Watcher | None = None,
        max_step_ms: float | None = None,
    ) -> None:
        self.machines = [Machine(index, one, self) for index, one in enumerate(hardware)]
        for machine in self.machines:
            machine.role = "prefill" if machine.index < split else "decode"
            machine.max_step_ms = machine.max_step_ms if max_step_ms is None else max_step_ms
        self.placer = Placer(hardware)
        self.queue: deque[Job] = deque()
        self.changes = Changes()
        self.assigned: list[dict[Job, int]] = [{} for _ in hardware]  # to decode: tokens it had when it was placed
        self._setting = setting
        self._watcher = watcher
        self._switches: dict[int, _Switch] = {}
        self._events: list[tuple[float, int, int, Machine | Job | None, int]] = []
        self._num_events = self._num_switches = 0
        self._link_free = [0.0] * len(hardware)
        self._roles_changed()

    def run(self, requests: Requests) -> list[Job]:
        """The whole load. Requests that have missed for good have `end_at` < 0."""
        most = self._setting.max_outputs_asked
        known = self._setting.known_outputs
        rows = zip(requests.at.tolist(), requests.prompts.tolist(), requests.outputs.tolist(), strict=True)
        jobs = [Job(at, prompt, outputs, outputs if known else most) for at, prompt, outputs in rows]
        last = jobs[-1].at + AFTER_S
        self._push(self._setting.heartbeat_s, _BEAT, None, 0)
        events = self._events
        for job in jobs:
            while events and events[0][0] <= job.at:
                self._event(*heapq.heappop(events))
            self._arrive(job.at, job)
        live = 1
        while events and live and events[0][0] <= last:
            self._event(*heapq.heappop(events))
            live = len(self.queue) + sum(map(len, self.assigned))
        return jobs

    def switch(self, now: float, index: int, role: Role) -> bool:
        """Change a worker's role. False (refused): it is not ready, or has the role."""
        machine = self.machines[index]
        if index in self._switches or machine.role == role:
            return False
        self._num_switches += 1
        self._switches[index] = _Switch(number=self._num_switches, role=role, began=now)
        self._push(
            now + self._setting.switch.timeout_s, _TIMEOUT, None, index + len(self.machines) * self._num_switches
        )
        self._state(now, index, "draining")
        self._roles_changed()
        queued, served = machine.give_away(now, self._setting.switch.finish_ms)
        running = machine.running()
        under_way = [job for job in self.assigned[index] if job not in running]
        for job in dict.fromkeys([*queued, *under_way]):
            self._begin_again(now, job, machine)
        for job in served:
            self._begin_again(now, job, machine)
        self._settle(now, index)
        return True

    def switch_at(self, when: float, index: int, role: Role) -> None:
        """Change a worker's role when the call has arrived."""
        self._push(when, _TO_PREFILL if role == "prefill" else _TO_DECODE, None, index)

    # ---- Listener of the machines

    def at(self, when: float, machine: Machine, version: int) -> None:
        """See Listener."""
        self._push(when, _MACHINE, machine, version)

    def computed(self, now: float, job: Job, last_tokens: int) -> None:
        """The source is done; what is left of the KV is moved."""
        hardware = self.machines[job.source].hardware
        moved = min(last_tokens, job.prompt)
        ms = hardware.latency_ms + moved * hardware.profile.kv_token_bytes / (hardware.gb_per_s * 1e6)
        self._push(now + ms / 1000, _ARRIVED, job, job.attempt)
        if job.source in self._switches:
            self._settle(now, job.source)

    def first_token(self, now: float, job: Job) -> None:
        """The first token of an attempt: the source, or the worker that it left, is done with it."""
        self.placer.prefilled(now, job)
        if job.kv_from >= 0:
            switch = self._switches.get(job.kv_from)
            if switch is not None and switch.leaving:
                switch.leaving -= 1
                self._settle(now, job.kv_from)
            job.kv_from = -1
        if job.first_at >= 0.0:
            return
        job.first_at = now
        accuracy = self.placer.accuracy
        kind = "remote" if job.source >= 0 else "alone"
        accuracy.first_token(
            kind,
            predicted_ms=job.predicted_ms,
            overhead_ms=job.overhead_ms,
            real_ms=(now - job.placed_at) * 1000,
        )
        if self._watcher is not None:
            self._watcher.on_first_token(now, job)

    def ended(self, now: float, job: Job) -> None:
        """Complete."""
        job.end_at = now
        self._unassign(now, job)
        self.placer.accuracy.end(num_outputs=job.outputs, predicted_tpot_ms=None, real_tpot_ms=None)
        if self._watcher is not None:
            self._watcher.on_end(now, job)
        if job.decode in self._switches:
            self._settle(now, job.decode)
        self._place_queue(now)

    def gave(self, now: float, machine: Machine, jobs: list[Job]) -> None:
        """Running requests leave `machine`: each to another decode worker, its KV from here, one after the other."""
        switch = self._switches[machine.index]
        switch.given = True
        switch.leaving += len(jobs)
        self.changes.moved += len(jobs)
        for job in jobs:
            self._unassign(now, job)
            job.kv_from = machine.index
            job.left = 0
            self.queue.appendleft(job)
        self._place_queue(now)
        self._settle(now, machine.index)

    # ---- inside

    def _push(self, when: float, kind: int, what: Machine | Job | None, number: int) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, kind, what, number))

    def _event(self, now: float, _: int, kind: int, what: Machine | Job | None, number: int) -> None:
        if isinstance(what, Machine):
            what.ended(now, number)
        elif isinstance(what, Job):
            if number == what.attempt:
                self.machines[what.decode].decode(now, what)
        elif kind == _BEAT:
            self._beat(now)
            self._push(now + self._setting.heartbeat_s, _BEAT, None, 0)
        elif kind == _SWITCHED:
            self._switched(now, number)
        elif kind == _TIMEOUT:
            self._roll_back(now, *divmod(number, len(self.machines)))
        else:
            self.switch(now, number, "prefill" if kind == _TO_PREFILL else "decode")

    def _beat(self, now: float) -> None:
        placer = self.placer
        for machine in self.machines:
            placer.free_tokens[machine.index] = machine.hardware.kv_tokens - machine.reserved
            placer.others_keys[machine.index] = max(0.0, machine.context - placer.keys[machine.index])
        if self._watcher is not None:
            self._watcher.on_beat(now, self)

    def _arrive(self, now: float, job: Job) -> None:
        if self._watcher is not None:
            self._watcher.on_request(now, job)
        if not self.queue and self._try(now, job):
            return
        if len(self.queue) < self._setting.max_queue:
            self.queue.append(job)

    def _place_queue(self, now: float) -> None:
        while self.queue and self._try(now, self.queue[0]):
            self.queue.popleft()

    def _try(self, now: float, job: Job) -> bool:
        has_kv = job.kv_from >= 0
        placed = self.placer.place(now, job, source_is_given=has_kv)
        if placed is None:
            return False
        self._dispatch(now, job, placed)
        return True

    def _dispatch(self, now: float, job: Job, placed: Placed) -> None:
        self.placer.assign(now, job, placed)
        self.assigned[placed.decode][job] = job.produced
        job.attempt += 1
        job.decode, job.source = placed.decode, placed.source
        job.placed_at, job.predicted_ms, job.overhead_ms = now, placed.ttft_ms, placed.overhead_ms
        job.remote = placed.source >= 0
        if job.kv_from >= 0:
            self._move(now, job)
        elif job.remote:
            job.left = max(0, job.prompt - 1 - job.done)
            if job.left:
                self.machines[placed.source].prefill(now, job)
            else:
                self.computed(now, job, job.done)
        else:
            job.left, job.done = job.prompt, 0
            self.machines[placed.decode].decode(now, job)

    def _move(self, now: float, job: Job) -> None:
        """Its KV goes over the link of the worker that it leaves, after what is on that link already."""
        hardware = self.machines[job.kv_from].hardware
        num_bytes = (job.prompt + job.produced) * hardware.profile.kv_token_bytes
        begin = max(now, self._link_free[job.kv_from])
        self._link_free[job.kv_from] = begin + num_bytes / (hardware.gb_per_s * 1e9)
        ms = hardware.latency_ms + self._setting.switch.move_ms
        self._push(self._link_free[job.kv_from] + ms / 1000, _ARRIVED, job, job.attempt)

    def _unassign(self, now: float, job: Job) -> None:
        produced = self.assigned[job.decode].pop(job)
        self.placer.prefilled(now, job)
        self.placer.unassign(job, produced)

    def _begin_again(self, now: float, job: Job, machine: Machine) -> None:
        """Neither running nor moved: dispatched anew. What was computed of its prompt by a source is kept there."""
        self.changes.begun_again += 1
        if job.remote and job.source != machine.index:
            source = self.machines[job.source]
            if job in source.prefills:
                source.drop(job)
        self._unassign(now, job)
        job.attempt += 1
        self.queue.appendleft(job)
        self._place_queue(now)

    def _settle(self, now: float, index: int) -> None:
        """Once nothing of the old role is left, the rest of a change takes its time."""
        switch, machine = self._switches[index], self.machines[index]
        if switch.settling or not switch.given or switch.leaving or not machine.idle:
            return
        switch.settling = True
        cost = self._setting.switch
        ms = cost.call_ms + (cost.to_prefill_ms if switch.role == "prefill" else cost.to_decode_ms)
        self._push(now + ms / 1000, _SWITCHED, None, index)

    def _switched(self, now: float, index: int) -> None:
        switch = self._switches.pop(index)
        self.machines[index].role = switch.role
        self.changes.busy_ms += (now - switch.began) * 1000
        if switch.role == "prefill":
            self.changes.to_prefill += 1
        else:
            self.changes.to_decode += 1
        self._state(now, index, "ready")
        self._roles_changed()
        self._place_queue(now)

    def _roll_back(self, now: float, number: int, index: int) -> None:
        """Not over in time: the old role again. What has moved stays where it went."""
        switch = self._switches.get(index)
        if switch is None or switch.number != number or switch.settling:
            return
        del self._switches[index]
        self.machines[index].giving = False
        self.changes.rolled_back += 1
        self.changes.busy_ms += (now - switch.began) * 1000
        self._state(now, index, "rolled back")
        self._roles_changed()
        self._place_queue(now)

    def _state(self, now: float, index: int, state: str) -> None:
        if self._watcher is not None:
            self._watcher.on_state(now, index, self.machines[index].role, state)

    def _roles_changed(self) -> None:
        ready = [machine for machine in self.machines if machine.index not in self._switches]
        self.placer.set_roles(
            [machine.index for machine in ready if machine.role == "decode"],
            [machine.index for machine in ready if machine.role == "prefill"],
        )


_MACHINE, _ARRIVED, _BEAT, _SWITCHED, _TO_PREFILL, _TO_DECODE, _TIMEOUT = range(7)
