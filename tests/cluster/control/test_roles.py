"""Plans and wishes carried out: fences, one change per pool, the last decode worker, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from cluster.control.roles import HAND_S, MAX_RECORDS, UNHEARD_S, Roles
from cluster.errors import NeapError
from tests.cluster.control.role_rig import LONG_PROMPTS, Rig, info, three


async def settle(roles: Roles) -> None:
    await asyncio.gather(*roles._tasks)


async def code_of(awaitable: Any) -> str:
    with pytest.raises(NeapError) as caught:
        await awaitable
    return caught.value.code


def test_a_plan_is_carried_out_with_both_fences_and_told_with_its_reason() -> None:
    async def scenario() -> None:
        rig = three(traffic=LONG_PROMPTS)
        roles = rig.roles()
        await roles.step()
        await settle(roles)
        ((address, request),) = rig.asked
        assert address == "at-decode-0"
        assert (request.incarnation, request.expected_epoch, request.role) == ("i-decode-0", 1, "prefill")
        assert (
            "decode-0 is prefill now" in rig.told[0] and "prompts are what there is too little room for" in rig.told[0]
        )
        assert [record.outcome for record in roles.records] == ["switched"]
        await roles.step()
        assert len(rig.asked) == 1 and not roles.plan()[0].switches  # the last decode worker stays

    asyncio.run(scenario())


def test_without_auto_or_while_a_change_is_under_way_nothing_is_planned() -> None:
    async def scenario() -> None:
        rig = three(traffic=LONG_PROMPTS)
        roles = rig.roles(auto=False)
        await roles.step()
        assert not roles._tasks and not rig.asked
        rig.holding = asyncio.Event()
        roles = rig.roles()
        await roles.step()
        await asyncio.sleep(0)
        await roles.step()
        assert len(rig.asked) == 1
        rig.holding.set()
        await settle(roles)

    asyncio.run(scenario())


def test_the_only_prefill_worker_is_replaced_when_it_is_silent() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles()
        await roles.step()
        rig.lost.add("prefill-0")
        rig.now += 1.0
        await roles.step()
        assert not rig.asked  # a second is no silence yet
        rig.now += 2.0
        await roles.step()
        await settle(roles)
        assert [request.role for _, request in rig.asked] == ["prefill"]
        assert "no prefill worker is ready" in rig.told[0]

    asyncio.run(scenario())


def test_a_worker_whose_process_is_gone_is_replaced_at_once() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles(interval_s=1000.0)
        running = asyncio.create_task(roles.run())
        await roles.look()
        del rig.workers["prefill-0"]  # as the controller takes it out of the map
        roles.on_worker_lost("prefill-0")
        await asyncio.wait_for(rig.called.wait(), 30)
        running.cancel()
        await roles.close()
        assert [request.role for _, request in rig.asked] == ["prefill"]

    asyncio.run(scenario())


def test_workers_that_no_router_has_spoken_of_yet_are_waited_for_but_not_for_ever() -> None:
    async def scenario() -> None:
        rig = three()
        rig.lost |= {"decode-0", "decode-1"}  # the router's links to them are not up yet
        roles = rig.roles()
        await roles.step()
        assert not rig.asked and "Not heard from yet: decode-0, decode-1" in roles.plan()[0].words[0]
        rig.now += UNHEARD_S + 1
        await roles.step()
        await settle(roles)
        assert [(address, request.role) for address, request in rig.asked] == [("at-prefill-0", "decode")]

    asyncio.run(scenario())


def test_a_router_that_does_not_answer_or_answers_nonsense_is_no_ground_for_changes() -> None:
    async def scenario() -> None:
        rig = three(traffic=LONG_PROMPTS, router_answers=False)
        roles = rig.roles()
        await roles.step()
        assert not rig.asked and "Not heard from yet" in roles.plan()[0].words[0]
        rig.router_answers = True
        rig.traffic = replace(LONG_PROMPTS, requests_per_s=float("nan"))
        await roles.step()
        assert not rig.asked

    asyncio.run(scenario())


def test_by_hand_roles_change_and_workers_are_drained() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles()
        reply = await roles.switch("decode-1", "prefill")
        assert (reply.outcome, reply.info.role, reply.moved) == ("switched", "prefill", 2)
        assert (await roles.switch("decode-1", "decode")).info.epoch == 9
        assert (await roles.drain("decode-0")).outcome == "drained"
        assert [record.role for record in roles.records] == ["prefill", "decode", None]
        assert {one.worker_id: one.state for one in roles.workers()}["decode-0"] == "draining"

    asyncio.run(scenario())


def test_the_last_ready_decode_worker_is_not_let_go_not_even_with_another_s_leaving() -> None:
    async def scenario() -> None:
        rig = three()
        rig.workers["spare-0"] = info("spare-0", "decode", state="switching")
        roles = rig.roles()
        rig.holding = asyncio.Event()
        rig.workers["decode-1"] = structs.replace(rig.workers["decode-1"], pool="other")
        first = asyncio.create_task(roles.switch("decode-0", "prefill"))
        await asyncio.wait_for(rig.called.wait(), 30)
        assert await code_of(roles.switch("decode-1", "prefill")) == "last_decode_worker"
        assert await code_of(roles.drain("decode-1")) == "last_decode_worker"
        rig.holding.set()
        await first
        assert (await roles.drain("prefill-0")).outcome == "drained"

    asyncio.run(scenario())


def test_one_change_per_pool_at_a_time() -> None:
    async def scenario() -> None:
        rig = three()
        rig.workers["decode-2"] = info("decode-2", "decode")
        rig.holding = asyncio.Event()
        roles = rig.roles()
        first = asyncio.create_task(roles.switch("decode-0", "prefill"))
        await asyncio.wait_for(rig.called.wait(), 30)
        assert await code_of(roles.switch("decode-1", "prefill")) == "switch_under_way"
        rig.holding.set()
        assert (await first).outcome == "switched"
        assert (await roles.switch("decode-1", "prefill")).outcome == "switched"

    asyncio.run(scenario())


def test_a_worker_that_has_changed_since_it_was_heard_is_asked_again_with_its_own_epoch() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles()
        stale = rig.status()
        rig.workers["decode-0"] = structs.replace(rig.workers["decode-0"], epoch=7)
        rig.status = lambda: stale  # type: ignore[method-assign]
        roles._infos = lambda: tuple(three().workers.values())
        assert (await roles.switch("decode-0", "prefill")).info.epoch == 11
        assert [request.expected_epoch for _, request in rig.asked] == [1, 7]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("reply", "broken", "code", "outcome"),
    [
        ({"outcome": "refused", "reason": "not ready"}, False, "switch_refused", "refused"),
        ({"outcome": "rolled_back", "reason": "the canary"}, False, "switch_rolled_back", "rolled_back"),
        ({}, True, "switch_unknown", "failed"),
    ],
)
def test_what_came_to_nothing_is_told_and_the_worker_left_alone_for_a_while(
    reply: dict[str, Any], broken: bool, code: str, outcome: str
) -> None:
    async def scenario() -> None:
        rig = three(reply=reply, broken=broken)
        roles = rig.roles()
        if outcome == "refused":  # at the epoch that it was asked with
            rig.reply["info"] = rig.workers["decode-0"]
        if outcome == "rolled_back":
            rig.reply["info"] = structs.replace(rig.workers["decode-0"], epoch=4)
        assert await code_of(roles.switch("decode-0", "prefill")) == code
        assert roles.records[-1].outcome == outcome and roles.records[-1].words in rig.told[-1]
        (seen,) = [one for one in roles._window.observe(rig.now).workers if one.info.worker_id == "decode-0"]
        assert seen.since_role_s == 0.0

    asyncio.run(scenario())


def test_an_unknown_worker_is_said_and_records_are_bounded() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles()
        assert await code_of(roles.switch("nobody", "decode")) == "worker_not_found"
        for index in range(MAX_RECORDS + 4):
            await roles.switch("decode-0", "prefill" if index % 2 else "decode")
        assert len(roles.records) == MAX_RECORDS

    asyncio.run(scenario())


def test_after_a_change_by_hand_the_planner_keeps_still_unless_a_worker_is_lost() -> None:
    async def scenario() -> None:
        rig = three()
        roles = rig.roles()
        await roles.switch("prefill-0", "decode")
        await roles.step()
        assert len(rig.asked) == 1 and "by hand" in roles.plan()[0].words[0]
        rig.now += HAND_S + 1
        await roles.step()
        await settle(roles)
        assert len(rig.asked) == 2  # there should be a prefill worker
        await roles.switch(rig.asked[1][0].removeprefix("at-"), "decode")
        rig.lost.add("decode-1")
        rig.now += 3.0
        await roles.step()
        await settle(roles)
        assert len(rig.asked) == 4

    asyncio.run(scenario())


def test_a_fault_of_the_planner_does_not_end_the_round_and_closing_waits_for_nobody() -> None:
    async def scenario() -> None:
        rig: Rig = three(traffic=LONG_PROMPTS)
        rig.holding = asyncio.Event()
        roles = rig.roles(interval_s=0.1)
        broken, calls = roles.look, []

        async def look() -> None:
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError
            await broken()

        roles.look = look  # type: ignore[method-assign]
        running = asyncio.create_task(roles.run())
        await asyncio.wait_for(rig.called.wait(), 30)
        running.cancel()
        await roles.close()
        assert len(calls) > 1 and not roles._tasks and not roles._changing

    asyncio.run(scenario())
