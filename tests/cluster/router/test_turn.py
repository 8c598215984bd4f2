"""Work of one turn: all of it, once, in order, whatever one of it raises."""

from __future__ import annotations

import asyncio

from cluster.router.turn import Turn


def test_work_runs_in_order_and_what_it_adds_runs_next_time() -> None:
    done: list[str] = []

    async def main() -> None:
        turn = Turn()

        def first() -> None:
            done.append("first")
            turn.add(lambda: done.append("added"))

        turn.add(first)
        turn.add(lambda: done.append("second"))
        assert done == []
        await asyncio.sleep(0)
        assert done == ["first", "second"]
        await asyncio.sleep(0)
        assert done == ["first", "second", "added"]

    asyncio.run(main())


def test_a_fault_in_one_stream_stops_no_other() -> None:
    done: list[str] = []

    async def main() -> None:
        turn = Turn()
        turn.add(lambda: done.append(str(1 // 0)))
        turn.add(lambda: done.append("other"))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert done == ["other"]
