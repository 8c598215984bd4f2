"""The scheduler under any order of commands, with the exact fake: texts equal the oracle's, nothing leaks.

The machine plays the network process: it adds, pulls (its copies land late, and write rubbish into whatever block they
still own), serves, pauses and goes on as another attempt, sets roles, aborts.
After every step it looks at every cached block's bytes and at every block's holders.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import engine.messages as m
from engine.config import EngineConfig, Role
from engine.fake_engine import ArrayMemory, FakeConfig, FakeRunner, build_fake_engine
from engine.kv.block_manager import BlockState
from engine.request import FinishReason, SamplingParams
from engine.scheduler.request_state import NO_ROW
from engine.scheduler.step_cost import StepCost
from tests.engine.scheduler.expected import BASES, BLOCK, MODEL, Call, Expected, keys_of, kv_of, tokens_bytes


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self, runner_class: type[FakeRunner]) -> None:
        super().__init__()
        self.runner_class = runner_class

    @initialize(
        num_blocks=st.one_of(st.integers(6, 28), st.just(80)),
        steps_in_flight=st.sampled_from([0, 1]),
        execute_at=st.sampled_from(["wait", "launch"]),
        role=st.sampled_from(["prefill", "decode"]),
        num_seqs=st.integers(1, 6),
        max_tokens=st.sampled_from([8, 40, 400]),
        caching=st.booleans(),
    )
    def start(self, num_blocks, steps_in_flight, execute_at, role, num_seqs, max_tokens, caching) -> None:  # type: ignore[no-untyped-def]
        engine = EngineConfig(
            model="fake",
            role=role,
            max_model_len=160,
            max_num_seqs=num_seqs,
            max_num_served=3,
            max_batched_tokens=max_tokens,
            max_step_ms=30.0,
            served_block_fraction=0.6,
            enable_prefix_caching=caching,
            steps_in_flight=steps_in_flight,
        )
        speed = StepCost(fixed_ms=1.0, ms_per_token=0.3, ms_per_token_kilocontext=0.5)
        config = FakeConfig(engine=engine, model=MODEL, speed=speed, num_blocks=num_blocks)
        self.core = build_fake_engine(config)
        self.memory = ArrayMemory(config.layout)
        self.core.runner = self.runner_class(MODEL, self.memory, max_model_len=160, speed=speed, execute_at=execute_at)
        self.core.runner.watch(self.core, engine)  # type: ignore[attr-defined]
        self.scheduler = self.core.scheduler
        self.requests: dict[str, Expected] = {}
        self.aborted_pulls: dict[str, list[int]] = {}
        self.reserving: dict[str, Expected] = {}
        self.calls: dict[str, Call] = {}
        self.kv_by_key: dict[bytes, np.ndarray] = {}
        self.num_ids = 0
        self.role = role
        self.num_roles_asked = self.num_roles_set = 0

    # -- commands -----------------------------------------------------------------------------------------------------

    def new_request(
        self, base: int, length: int, num_outputs: int, limit: int, temperature: float, num_scores: int | None
    ) -> m.Add:
        self.num_ids += 1
        prompt = BASES[base][:length]
        seed = self.num_ids % 3
        params = SamplingParams(
            temperature=temperature,
            max_tokens=limit,
            min_tokens=min(limit, 2),
            ignore_eos=base == 0,
            prompt_logprobs=num_scores,
        )
        room = min(limit, 160 - length, self.scheduler.blocks.num_usable * BLOCK - length + 1)
        text = MODEL.oracle(prompt, params, seed=seed, num_tokens=max(room, 1))
        got = text[: min(num_outputs, len(text) - 1)]
        self.learn(prompt + text)
        request_id = f"r{self.num_ids}"
        self.reserving[request_id] = Expected(
            prompt=prompt, text=text, got=list(got), wants_scores=num_scores is not None
        )
        return m.Add(
            request_id=request_id,
            prompt=tokens_bytes(prompt),
            params=params,
            seed=seed,
            outputs=tokens_bytes(got),
        )

    def learn(self, tokens: list[int]) -> None:
        kv = kv_of(tokens)
        for i, key in enumerate(keys_of(tokens)):
            self.kv_by_key[key] = kv[i * BLOCK : (i + 1) * BLOCK]

    @rule(
        base=st.integers(0, 1),
        length=st.one_of(st.integers(1, 120), st.integers(1, 20)),
        num_outputs=st.sampled_from([0, 0, 5]),
        limit=st.one_of(st.integers(1, 50), st.integers(60, 100)),
        temperature=st.sampled_from([0.0, 1.0]),
        pull=st.booleans(),
        num_scores=st.sampled_from([None, None, None, 0, 2]),
        priority=st.sampled_from([0, 0, 0, -1, 7]),
    )
    def ask(self, *, pull: bool, priority: int, **values: Any) -> None:
        add = msgspec.structs.replace(self.new_request(**values), priority=priority)
        self.reserving[add.request_id].add = add
        if pull:
            self.core.submit(m.Reserve(add=add))
        else:
            self.requests[add.request_id] = self.reserving.pop(add.request_id)
            self.core.submit(add)

    def open_pulls(self) -> list[str]:
        return [rid for rid, expected in self.requests.items() if expected.pull_blocks]

    @precondition(lambda self: self.open_pulls())
    @rule(data=st.data(), commit=st.booleans(), index=st.integers(0, 7))
    def land_copy(self, data: st.DataObject, commit: bool, index: int) -> None:
        request_id = data.draw(st.sampled_from(self.open_pulls()))
        expected = self.requests[request_id]
        i = index % len(expected.pull_blocks)
        if i in expected.open_blocks() and expected.copy(i, self.memory) == BLOCK and commit:
            expected.landed.add(i)
            checksum = xxhash.xxh3_64_intdigest(self.memory.block(expected.pull_blocks[i]).data)
            self.core.submit(m.Commit(request_id=request_id, first_block=i, checksums=(checksum,)))

    @precondition(lambda self: self.open_pulls())
    @rule(data=st.data(), complete=st.booleans(), num_lost=st.sampled_from([0, 0, 1, 20]))
    def close_pull(self, data: st.DataObject, complete: bool, num_lost: int) -> None:
        request_id = data.draw(st.sampled_from(self.open_pulls()))
        expected = self.requests[request_id]
        num_computed = len(expected.prompt) + len(expected.got) - 1
        for i in expected.open_blocks():
            if complete:  # all copies land in the last moment
                expected.copy(i, self.memory)
            else:
                num_computed = min(num_computed, i * BLOCK)
        expected.pull_blocks = []
        self.core.submit(m.PullClosed(request_id=request_id, num_computed_tokens=max(num_computed - num_lost, 0)))

    @precondition(lambda self: self.aborted_pulls)
    @rule(data=st.data(), close=st.booleans())
    def late_copy(self, data: st.DataObject, close: bool) -> None:
        """A copy outlives its abort and writes rubbish; after PullClosed nothing more may be written."""
        request_id = data.draw(st.sampled_from(sorted(self.aborted_pulls)))
        for block_id in self.aborted_pulls[request_id]:
            self.memory.block(block_id)[:] = 0xEE
        if close:
            del self.aborted_pulls[request_id]
            self.core.submit(m.PullClosed(request_id=request_id, num_computed_tokens=0))

    def unfinished(self) -> list[str]:
        return [rid for rid, expected in self.requests.items() if not expected.ended]

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.unfinished()))
        self.submit_abort(request_id)

    @precondition(lambda self: self.open_pulls())
    @rule()
    def abort_pull(self) -> None:
        self.submit_abort(self.open_pulls()[0])

    def submit_abort(self, request_id: str) -> None:
        expected = self.requests.pop(request_id)
        self.core.submit(m.Abort(request_id=request_id))
        if expected.pull_blocks:
            self.aborted_pulls[request_id] = [expected.pull_blocks[i] for i in expected.open_blocks()]

    @precondition(lambda self: self.reserving)
    @rule()
    def abort_reserving(self) -> None:
        request_id, _ = self.reserving.popitem()
        self.core.submit(m.Abort(request_id=request_id))

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        """Sometimes twice, or while a pull is open: both mean nothing."""
        self.core.submit(m.Pause(request_id=data.draw(st.sampled_from(self.unfinished()))))

    def paused(self) -> list[str]:
        return [rid for rid, expected in self.requests.items() if expected.num_held >= 0]

    @precondition(lambda self: self.paused())
    @rule(data=st.data(), pull=st.booleans(), release=st.booleans())
    def go_on(self, data: st.DataObject, pull: bool, release: bool) -> None:
        self.move(data.draw(st.sampled_from(self.paused())), pull=pull, release=release)

    def move(self, request_id: str, *, pull: bool, release: bool) -> None:
        """The next attempt of a paused request; without `release` the old one stays paused."""
        old = self.requests[request_id]
        self.num_ids += 1
        new_id = f"r{self.num_ids}"
        assert old.add is not None
        add = msgspec.structs.replace(old.add, request_id=new_id, outputs=tokens_bytes(old.got))
        new = Expected(prompt=old.prompt, text=old.text, got=list(old.got), wants_scores=old.wants_scores, add=add)
        if release:
            self.submit_abort(request_id)
        if pull:
            self.reserving[new_id] = new
            self.core.submit(m.Reserve(add=add))
        else:
            self.requests[new_id] = new
            self.core.submit(add)

    @rule(role=st.sampled_from(["prefill", "decode"]))
    def set_role(self, role: Role) -> None:
        self.core.submit(m.SetRole(role=role))
        self.role = role
        self.num_roles_asked += 1

    @rule(
        base=st.integers(0, 1),
        length=st.integers(1, 120),
        start=st.integers(0, 3),
        budget=st.sampled_from([-1, -1, 0, 20]),
    )
    def serve(self, base: int, length: int, start: int, budget: int) -> None:
        self.num_ids += 1
        tokens = BASES[base][:length]
        first = min(start, (length - 1) // BLOCK) * BLOCK
        self.learn(tokens)
        call_id = f"c{self.num_ids}"
        self.calls[call_id] = Call(kv=kv_of(tokens), start=first, next_block=first // BLOCK)
        self.core.submit(
            m.Serve(
                call_id=call_id, tokens=tokens_bytes(tokens), start=first, end=length - 1, max_compute_tokens=budget
            )
            if length - 1 >= first
            else m.EndServe(call_id=call_id)
        )

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def end_serve(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(sorted(self.calls)))
        del self.calls[call_id]
        self.core.submit(m.EndServe(call_id=call_id))

    @rule()
    def end_done_calls(self) -> None:
        for call_id in [call_id for call_id, call in self.calls.items() if call.done]:
            del self.calls[call_id]
            self.core.submit(m.EndServe(call_id=call_id))

    # -- steps and what they show -------------------------------------------------------------------------------------

    @rule(num=st.integers(1, 12))
    def step(self, num: int) -> None:
        for _ in range(num):
            if not self.core.has_work:
                assert self.core.step() is None
                return
            events = self.core.step()
            if events is not None:
                self.see(events)
            self.check_pool()

    def see(self, events: m.StepEvents) -> None:
        pauses: list[m.Paused] = []
        for reply in events.replies:
            if isinstance(reply, m.Reserved):
                self.see_reserved(reply)
            elif isinstance(reply, m.NoSpace):
                self.reserving.pop(reply.request_id, None)
            elif isinstance(reply, m.PromptLogprobs):
                self.requests[reply.request_id].take_scores(reply)
            elif isinstance(reply, m.ServeBusy):
                self.calls.pop(reply.call_id, None)
            elif isinstance(reply, m.RoleSet):
                self.num_roles_set += 1
            elif isinstance(reply, m.Paused):
                pauses.append(reply)
            elif not isinstance(reply, m.Probed) and reply.call_id in self.calls:
                self.calls[reply.call_id].see(reply)
        for message in events.tokens:
            self.see_tokens(message)
        for told in pauses:  # tokens of the same message come first
            assert self.requests[told.request_id].num_held == -1 and not self.requests[told.request_id].ended
            self.requests[told.request_id].num_held = told.num_held_tokens
        assert self.num_roles_set == self.num_roles_asked, "a role is answered with the step that it is set for"
        assert self.scheduler.role == self.role

    def see_tokens(self, message: m.NewTokens) -> None:
        expected = self.requests[message.request_id]
        assert not expected.ended and expected.num_held < 0, "a message after the end, or after its pause"
        assert message.first_position == len(expected.got)
        expected.got += message.token_ids
        if message.finish_reason is FinishReason.ABORT:
            assert message.error == "kv_capacity_exceeded" and not message.token_ids
            assert len(expected.prompt) + len(expected.got) > self.scheduler.blocks.num_usable * BLOCK
            expected.ended = True
            return
        assert expected.got == expected.text[: len(expected.got)], f"{message.request_id}: the KV was not its own"
        assert not expected.wants_scores or len(expected.scores) == len(expected.prompt) - 1
        expected.ended = message.finish_reason is not None
        assert expected.ended == (len(expected.got) == len(expected.text))
        if message.finish_reason is FinishReason.STOP:
            assert message.stop_token == expected.got[-1] == MODEL.eos_token_id

    def see_reserved(self, reply: m.Reserved) -> None:
        expected = self.reserving.pop(reply.request_id, None)
        if expected is None:
            return
        num_cached = reply.num_cached_tokens // BLOCK
        assert len(reply.block_ids) == -(-(len(expected.prompt) + len(expected.got)) // BLOCK)
        for block_id in reply.block_ids[num_cached:]:
            assert self.scheduler.blocks.state(block_id) is BlockState.LOADING
        expected.pull_blocks = list(reply.block_ids)
        expected.landed = set(range(num_cached))
        self.requests[reply.request_id] = expected

    def check_pool(self) -> None:
        """Cached blocks hold their key's KV, offered pieces keep theirs, every block has its holders and no others."""
        blocks = self.scheduler.blocks
        for key, block_id in blocks.cache.items():
            assert np.array_equal(self.memory.bytes6[block_id, 0, :, 0].transpose(1, 0, 2), self.kv_by_key[key])
            assert blocks.checksum(block_id) == xxhash.xxh3_64_intdigest(self.memory.block(block_id).data)
        for call in self.calls.values():
            call.check_pieces(self.memory)
        scheduler = self.scheduler
        book, seats = scheduler._book, list(scheduler._seats._closing)
        seated = [*book.running.values(), *book.pulling.values(), *book.landed.values(), *book.pausing.values()]
        seats += [one.seat for one in (*seated, *scheduler._served.calls.values()) if one.seat]
        refs = Counter(block_id for seat in seats for block_id in seat.block_ids)
        for request_id in self.paused():
            refs.update(self.requests[request_id].pinned(blocks))
        rows = [seat.row for seat in seats if seat.row != NO_ROW]  # pulls have none before they run
        assert len(set(rows)) == len(rows), "two requests have one row"
        for block_id in range(1, blocks.num_usable + 1):
            assert blocks.num_refs(block_id) == refs[block_id]
            assert refs[block_id] <= 1 or blocks.state(block_id) is BlockState.READY, "a block has two writers"
        assert blocks.num_served <= blocks.served_quota
        for block_ids in self.aborted_pulls.values():
            assert all(blocks.state(b) is BlockState.QUARANTINED for b in block_ids), "quarantine ended too early"

    def drain(self) -> None:
        """End every pull and call, then run everything to its end."""
        for _ in range(3000):
            for request_id in self.open_pulls():
                self.requests[request_id].pull_blocks = []
                self.core.submit(m.PullClosed(request_id=request_id, num_computed_tokens=0))
            self.end_done_calls()
            for request_id in self.paused():
                self.move(request_id, pull=False, release=True)
            if not self.core.has_work:
                break
            self.step(1)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for request_id in self.aborted_pulls:
            self.core.submit(m.PullClosed(request_id=request_id, num_computed_tokens=0))
        self.aborted_pulls = {}
        self.drain()
        assert not self.core.has_work and not self.reserving
        assert all(expected.ended for expected in self.requests.values()), "a request never ended"
        load = self.core.load()
        assert (load.num_assigned, load.num_served, load.num_paused) == (0, 0, 0)
        assert (load.num_referenced_blocks, load.num_quarantined_blocks) == (0, 0)
        assert load.num_free_blocks == load.num_blocks


def run(runner_class: type[FakeRunner], max_examples: int, num_rules: int) -> None:
    run_state_machine_as_test(
        lambda: SchedulerMachine(runner_class),  # type: ignore[arg-type]
        settings=settings(max_examples=max_examples, stateful_step_count=num_rules, deadline=None),
    )


@pytest.mark.timeout(400)
def test_any_order_of_commands_keeps_texts_and_blocks_right(watched_runner: type[FakeRunner]) -> None:
    run(watched_runner, 50, 40)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_any_order_of_commands_in_full(watched_runner: type[FakeRunner]) -> None:
    run(watched_runner, 4000, 80)
