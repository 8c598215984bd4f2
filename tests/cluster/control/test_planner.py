"""The planner: what it changes, what it leaves alone, that it comes to rest, and that it tells why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from cluster.control.observation import Observation, WorkerSeen
from cluster.control.planner import Plan, Planner
from cluster.spec import RolesSpec
from cluster.traffic import Traffic
from engine.messages import Load
from engine.scheduler.profile import Profile
from tests.cluster.control.seen import profile, seen, traffic, worker, workers

OPTIONS = RolesSpec(ttft_ms=1000.0, tpot_ms=30.0)
LONG, SHORT = (4000.0, 20.0), (100.0, 400.0)  # prompt and answer


def plan(observation: Observation, options: RolesSpec = OPTIONS) -> Plan:
    return Planner(options).plan(observation)


def changes(found: Plan) -> list[tuple[str, str]]:
    return [(switch.worker_id, switch.role) for switch in found.switches]


def after(observation: Observation, found: Plan, seconds: float = 1000.0) -> Observation:
    """The same workers and traffic when the plan has been carried out, and some time has passed."""
    roles = {switch.worker_id: switch.role for switch in found.switches}
    moved = []
    for one in observation.workers:
        changed = one.info.worker_id in roles
        info = structs.replace(
            one.info, role=roles.get(one.info.worker_id, one.info.role), epoch=one.info.epoch + 3 * changed
        )
        moved.append(replace(one, info=info, since_role_s=(0.0 if changed else one.since_role_s) + seconds))
    return replace(observation, workers=tuple(moved))


def test_long_prompts_turn_decode_workers_to_prefill_and_short_ones_turn_them_back() -> None:
    observation = seen(workers(1, 3), traffic(4.0, *LONG))
    found = plan(observation)
    assert changes(found) == [("decode-0", "prefill")]
    (switch,) = found.switches
    assert (switch.incarnation, switch.epoch) == ("i-decode-0", 3)
    moved = replace(after(observation, found), traffic=traffic(20.0, *SHORT))
    assert [role for _, role in changes(plan(moved))] == ["decode"]


def test_light_load_changes_nothing_whatever_the_split() -> None:
    for num_prefill in range(1, 4):
        found = plan(seen(workers(num_prefill, 4 - num_prefill), traffic(0.5, 1000.0, 50.0)))
        assert not found.switches and "pressure is below" in found.words[-1]


def test_a_missed_target_is_reason_to_look_earlier_but_only_for_more_of_the_role_that_it_needs() -> None:
    came = traffic(4.0, *LONG)
    calm = seen(workers(1, 3), came)
    pressure = plan(calm).pressure
    assert pressure is not None
    above, far_above = replace_options(act_at=1.5 * pressure), replace_options(act_at=2.5 * pressure)
    assert plan(calm, above).switches == ()
    late = replace(calm, traffic=replace(came, ttft_p90_ms=2500.0))
    found = plan(late, above)
    assert changes(found) == [("decode-0", "prefill")]
    assert any("Missed: one first token in ten takes over 2500 ms" in line for line in found.words)
    assert plan(late, far_above).switches == ()
    assert plan(replace(calm, traffic=replace(came, tpot_p90_ms=99.0)), above).switches == ()


def test_rows_that_fill_a_decode_worker_are_more_need_than_answers_that_have_ended_so_far() -> None:
    came = traffic(2.0, 100.0, 20.0)  # short answers, as far as is known
    assert plan(seen(workers(3, 1), came)).switches == ()
    full = tuple(replace(one, mean_rows=120.0 if one.info.role == "decode" else 0.0) for one in workers(3, 1))
    assert [role for _, role in changes(plan(seen(full, came)))] == ["decode"]
    short = replace(came, requests_per_s=60.0, num_requests=1200, mean_prompt_tokens=4000.0)
    assert [role for _, role in changes(plan(seen(full, short)))] != ["decode"]  # they prefill themselves


def replace_options(**changed: float) -> RolesSpec:
    return structs.replace(OPTIONS, **changed)


def test_one_decode_worker_is_always_left() -> None:
    assert plan(seen(workers(1, 1), traffic(50.0, *LONG))).switches == ()
    found = plan(seen(workers(1, 2), traffic(50.0, *LONG)))
    assert len(found.switches) == 1
    assert plan(after(seen(workers(1, 2), traffic(50.0, *LONG)), found)).switches == ()


def test_the_last_prefill_worker_stays_where_the_file_has_some() -> None:
    flood = traffic(200.0, 20.0, 400.0)
    assert plan(seen(workers(1, 3), flood)).switches == ()
    assert changes(plan(seen(workers(1, 3), flood, wants_prefill=False))) == [("prefill-0", "decode")]
    assert plan(seen(workers(1, 3), flood, wants_prefill=False, needs_prefill=True)).switches == ()


@pytest.mark.parametrize("came", [Traffic(), traffic(0.2, 100.0, 10.0), traffic(3.0, *LONG)])
def test_where_the_only_prefill_worker_is_gone_another_takes_its_place_unless_it_has_just_tried(came: Traffic) -> None:
    found = plan(seen(workers(0, 3, since_role_s=5.0), came))
    assert changes(found) == [("decode-0", "prefill")] and "no prefill worker is ready" in found.words[0]
    first, *others = workers(0, 3, since_role_s=5.0)
    assert changes(plan(seen((replace(first, since_role_s=1.0), *others), came))) == [("decode-1", "prefill")]
    assert "has tried a moment ago" in plan(seen(workers(0, 3, since_role_s=1.0), came)).words[0]


def test_without_a_prefill_pool_one_is_made_where_prompts_would_hold_up_answers() -> None:
    assert plan(seen(workers(0, 3), traffic(0.2, 100.0, 10.0), wants_prefill=False)).switches == ()
    assert plan(seen(workers(0, 3), Traffic(), wants_prefill=False)).switches == ()
    assert len(plan(seen(workers(0, 3), traffic(0.2, *LONG), wants_prefill=False)).switches) == 1


def test_one_worker_that_is_left_does_both_and_one_that_prefills_goes_over_to_decode() -> None:
    assert plan(seen(workers(0, 1), traffic(3.0, *LONG))).switches == ()
    assert changes(plan(seen(workers(1, 0), Traffic()))) == [("prefill-0", "decode")]
    assert plan(seen(workers(1, 0), Traffic(), needs_prefill=True)).switches == ()
    assert plan(seen(workers(0, 0), Traffic())).switches == ()


def test_nothing_is_planned_while_a_change_is_under_way_but_a_drained_worker_holds_nobody_up() -> None:
    ready = workers(1, 3)
    for state in ("draining", "switching", "verifying"):
        moving = worker("other-0", "decode", state=state, since_state_s=0.2)
        found = plan(seen((*ready, moving), traffic(4.0, *LONG)))
        assert found.switches == () and "other-0" in found.words[0]
    drained = worker("other-0", "decode", state="draining", since_state_s=60.0)
    assert len(plan(seen((*ready, drained), traffic(4.0, *LONG))).switches) == 1


def test_one_change_per_pool_and_no_more_than_the_most() -> None:
    decode = tuple(worker(f"d-{i}", "decode", pool=f"pool-{i % 3}") for i in range(12))
    flood = seen((worker("p-0", "prefill"), *decode), traffic(20.0, *LONG))
    pools = [next(w.info.pool for w in decode if w.info.worker_id == s.worker_id) for s in plan(flood).switches]
    assert sorted(pools) == ["pool-0", "pool-1", "pool-2"]
    assert len(plan(flood, replace_options(max_switches=2)).switches) == 2


def test_of_equal_workers_the_one_that_has_least_to_move_goes_and_none_that_changed_lately() -> None:
    busy, idle = Load(num_running=8, context_tokens=9000), Load(num_running=1, context_tokens=300)
    ready = (
        worker("prefill-0", "prefill"),
        worker("decode-0", "decode", load=busy),
        worker("decode-1", "decode", load=idle),
    )
    assert changes(plan(seen(ready, traffic(4.0, *LONG)))) == [("decode-1", "prefill")]
    lately = (*ready[:2], replace(ready[2], since_role_s=5.0))
    assert changes(plan(seen(lately, traffic(4.0, *LONG)))) == [("decode-0", "prefill")]


def test_of_unequal_workers_the_one_goes_that_is_better_at_the_new_role() -> None:
    ready = (
        worker("prefill-0", "prefill"),
        worker("decode-0", "decode", profile=profile(prefill=2.0, decode=0.5)),
        worker("decode-1", "decode", profile=profile(prefill=0.5, decode=1.0)),
        worker("decode-2", "decode"),
    )
    found = plan(seen(ready, traffic(5.0, *LONG)))
    assert changes(found) == [("decode-1", "prefill")]
    assert "it prefills 2.00 and decodes" in found.switches[0].why.replace("1.78", "2.00")


def test_two_workers_that_suit_each_other_s_role_change_places() -> None:
    fast_decoder, fast_prefiller = profile(prefill=4.0, decode=0.8), profile(prefill=0.8, decode=2.0)
    wrong = (
        worker("prefill-0", "prefill", profile=fast_decoder),
        worker("decode-0", "decode", profile=fast_prefiller),
    )
    observation = seen(wrong, traffic(2.0, 2000.0, 200.0))
    first = plan(observation)
    assert changes(first) == [("prefill-0", "decode")] and "suit each other's role" in first.switches[0].why
    second = plan(after(observation, first, seconds=5.0))
    assert changes(second) == [("decode-0", "prefill")]
    assert plan(after(after(observation, first), second)).switches == ()


def test_a_change_that_costs_more_than_it_saves_is_not_made() -> None:
    heavy = Load(num_running=50, context_tokens=400_000)  # 40 s to move
    ready = (worker("prefill-0", "prefill"), *(worker(f"decode-{i}", "decode", load=heavy) for i in range(2)))
    found = plan(seen(ready, traffic(3.0, *LONG)))
    assert found.switches == () and "would save" in found.words[-1]


def test_too_few_requests_and_unmeasured_workers_are_no_ground_for_changes() -> None:
    few = replace(traffic(0.2, *LONG), ttft_p90_ms=9000.0)
    assert "too few requests" in plan(seen(workers(1, 3), few)).words[-1]
    blank = workers(1, 3, profile=Profile())
    assert "has measured its speed" in plan(seen(blank, traffic(4.0, *LONG))).words[-1]


loads = st.builds(Load, num_running=st.integers(0, 50), context_tokens=st.integers(0, 50_000))
speeds = st.floats(0.3, 3.0)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[WorkerSeen, ...]:
    ready = []
    for index in range(draw(st.integers(2, 12))):
        role = "decode" if index == 0 else draw(st.sampled_from(["prefill", "decode"]))
        own = profile(prefill=draw(speeds), decode=draw(speeds))
        pool = draw(st.sampled_from("ab"))
        ready.append(worker(f"w-{index:02}", role, profile=own, pool=pool, load=draw(loads)))  # type: ignore[arg-type]
    return tuple(ready)


few = settings(max_examples=40)
came = st.builds(traffic, st.floats(0.5, 60.0), st.floats(10.0, 6000.0), st.floats(5.0, 800.0))


@few
@given(clusters(), came, st.booleans())
def test_under_constant_load_it_comes_to_rest(ready: tuple[WorkerSeen, ...], load: Traffic, wants: bool) -> None:
    observation, num_changes = seen(ready, load, wants_prefill=wants), 0
    while found := plan(observation).switches:
        num_changes += len(found)
        assert num_changes <= 3 * len(ready)
        observation = after(observation, Plan(switches=found))
    assert plan(observation).switches == ()
    assert any(w.info.role == "decode" for w in observation.workers)


@few
@given(clusters(), came, st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_more_prompt_tokens_to_compute_never_take_prefill_away(
    ready: tuple[WorkerSeen, ...], load: Traffic, one: float, other: float
) -> None:
    """`one` and `other`: shares of the prompt tokens that are cached. Two workers that change places take none away."""

    def takes_away(cached: float) -> bool:
        found = plan(seen(ready, replace(load, cached_tokens_per_s=cached * load.prompt_tokens_per_s))).switches
        return any(one.role == "decode" and "suit each other" not in one.why for one in found)

    assert takes_away(max(one, other)) or not takes_away(min(one, other))


@few
@given(st.integers(2, 12), came, st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_more_prompt_tokens_never_end_with_fewer_prefill_workers(
    size: int, load: Traffic, one: float, other: float
) -> None:
    def rest(cached: float) -> int:
        observation = seen(workers(size // 2, size - size // 2), replace(load, cached_tokens_per_s=cached))
        while found := plan(observation).switches:
            observation = after(observation, Plan(switches=found))
        return sum(w.info.role == "prefill" for w in observation.workers)

    tokens = load.prompt_tokens_per_s
    assert rest(min(one, other) * tokens) >= rest(max(one, other) * tokens)
