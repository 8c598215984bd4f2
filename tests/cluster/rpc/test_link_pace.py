"""The pace of a link: what waits leaves together downwards; upwards no more than the router says to have taken."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from cluster.rpc.channel import open_channel
from cluster.rpc.convert import router_batch_to_pb, router_messages_in
from cluster.rpc.outbox import MAX_BATCH, MAX_BATCH_BYTES, MAX_UNTAKEN, RouterOutbox
from cluster.rpc.pb import worker_pb2
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.seal import SealedChannel
from cluster.types import AbortRequest
from tests.cluster.rpc.test_link import DISPATCH, Router, Worker, serving, tokens, until


def test_what_waits_leaves_together_aborts_first() -> None:
    outbox = RouterOutbox()
    for number in range(MAX_BATCH + 5):
        outbox.put(replace(DISPATCH, request_id=f"r{number}"))
    outbox.put(AbortRequest(request_id="x", attempt=1))
    first, second = outbox.take_some(), outbox.take_some()
    assert isinstance(first[0], AbortRequest) and len(first) == MAX_BATCH
    assert [message.request_id for message in (*first[1:], *second)] == [f"r{n}" for n in range(MAX_BATCH + 5)]
    assert outbox.take_some() == []


def test_large_prompts_do_not_wait_for_each_other() -> None:
    outbox = RouterOutbox()
    for number in range(3):
        outbox.put(replace(DISPATCH, request_id=f"r{number}", prompt=bytes(MAX_BATCH_BYTES)))
    assert [len(outbox.take_some()) for _ in range(4)] == [1, 1, 1, 0]


def test_one_message_is_no_batch() -> None:
    alone = router_batch_to_pb([DISPATCH])
    assert alone.WhichOneof("kind") == "dispatch" and list(router_messages_in(alone)) == [alone]
    both = router_batch_to_pb([DISPATCH], taken=3)
    assert [part.WhichOneof("kind") for part in router_messages_in(both)] == ["dispatch", "taken"]
    assert router_batch_to_pb([], taken=3).taken == 3


def test_many_messages_arrive_in_order() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker):
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
            for number in range(700):
                link.send(replace(DISPATCH, request_id=f"r{number}"))
            await until(lambda: len(worker.messages) == 700)
            assert [message.request_id for _, message in worker.messages] == [f"r{n}" for n in range(700)]
            await link.close()

    asyncio.run(run())


def test_a_router_that_takes_nothing_gets_a_few_batches_and_then_all_the_rest_in_one() -> None:
    async def run() -> None:
        worker = Worker()
        async with serving(worker, max_tokens=10_000) as (servicer, _), open_channel(worker.address) as channel:
            call = pb_grpc.WorkerStub(SealedChannel(channel)).Link()
            await call.write(worker_pb2.RouterMessage(hello=worker_pb2.Hello(router_id="r")))
            assert (await call.read()).HasField("welcome")
            await call.write(router_batch_to_pb([DISPATCH]))
            await until(lambda: worker.messages)
            link_id = worker.messages[0][0]
            for position in range(500):
                servicer.put(link_id, tokens(position, position))
                servicer.flush()
                await asyncio.sleep(0)
            batches = [await call.read() for _ in range(MAX_UNTAKEN)]
            num_read = sum(len(entry.tokens.token_ids) for batch in batches for entry in batch.batch.entries)
            assert num_read < 500
            await call.write(worker_pb2.RouterMessage(taken=2))
            last = (await call.read()).batch.entries
            assert len(last) == 1  # melted: one entry for one choice
            assert list(last[0].tokens.token_ids) == list(range(num_read, 500))
            call.cancel()

    asyncio.run(run())


def test_a_router_that_reads_is_never_kept_waiting() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker) as (servicer, _):
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
            link.send(DISPATCH)
            await until(lambda: worker.messages)
            for position in range(50):
                servicer.put(worker.messages[0][0], tokens(position, position))
                servicer.flush()
                await until(lambda position=position: router.has_tokens(position + 1))
            assert router.num_messages == 50
            await link.close()

    asyncio.run(run())
