"""What a router holds while it serves, and the answer to "can this model be served now?"."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.errors import RequestError, UnavailableError
from cluster.metrics import RouterMetrics
from cluster.router.admission import Admission
from cluster.router.body import BodyBudget
from cluster.router.call import CallContext
from cluster.router.openai.sampling import SamplingDefaults, load_defaults
from cluster.router.sse import PING_S
from cluster.router.workers import Peer, WorkerLinks
from cluster.spec import RouterSpec
from cluster.traffic import TrafficWindow
from engine.text.tokenizer import Tokenizer

TEXT_THREADS = 2
MAX_BODIES = 64  # of the largest allowed size, in memory at once
LAG_SAMPLE_S = 0.25

log = logging.getLogger("neap.router")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether requests can be served now; if not, how far we are and why."""

    stage: str
    percent: int
    reason: str
    prefill_ready: int
    decode_ready: int

    @property
    def ready(self) -> bool:
        """True when a request could be served."""
        return self.stage == "ready"


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What any ready decode worker can do. vocab_size 0: not told."""

    max_model_len: int
    vocab_size: int


class RouterService:
    """One router: its links, queue, metrics and text model. `text` is None until it is loaded."""

    def __init__(
        self,
        spec: RouterSpec,
        links: WorkerLinks,
        *,
        metrics: RouterMetrics,
        text: Tokenizer | None = None,
        defaults: SamplingDefaults | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.spec = spec
        self.links = links
        self.metrics = metrics
        self.text = text
        self.defaults = defaults or SamplingDefaults()
        self.clock = clock
        self.started_at = clock()
        self.created = int(time.time())
        self.draining = False
        self.ping_s = PING_S
        self.admission = Admission(max_queue=spec.max_queue, max_running=spec.max_running)
        self.calls = CallContext(
            cluster=links,
            admission=self.admission,
            metrics=metrics,
            clock=clock,
            max_blocked_bytes=spec.stream_buffer_bytes // 2,  # the kernel and the server's own buffer hold the rest
            traffic=TrafficWindow(spec.traffic_window_s),
        )
        self.bodies = BodyBudget(MAX_BODIES * spec.max_body_bytes)
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._num_in_threads = 0

    async def off_loop(self, work: Callable[[], _Result]) -> _Result:
        """Run work in a text thread; bounded like all requests together. Raises UnavailableError overloaded."""
        if self._num_in_threads >= self.spec.max_queue + self.spec.max_running:
            raise UnavailableError("overloaded", retry_after_s=self.admission.retry_after_s(self.clock()))
        self._num_in_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_in_threads -= 1

    async def load_text(self) -> None:
        """Load tokenizer and sampling defaults from the checkpoint's folder. Raises ValueError naming the file."""
        path = Path(self.spec.model_path)
        loop = asyncio.get_running_loop()
        self.defaults = await loop.run_in_executor(self._threads, load_defaults, path)
        self.text = await loop.run_in_executor(self._threads, Tokenizer.load, path)

    def serving(self, role: str) -> list[Peer]:
        """Workers of a role that could be given work now."""
        name = self.spec.served_model_name
        return [
            peer
            for peer in self.links.peers()
            if peer.up and peer.info.role == role and peer.info.state == "ready" and peer.info.model in ("", name)
        ]

    def readiness(self) -> Readiness:
        """See Readiness. A decode worker alone can serve (it prefills itself) unless the spec wants a prefill one."""
        num_decode, num_prefill = len(self.serving("decode")), len(self.serving("prefill"))
        known = self.links.peers()
        say = partial(Readiness, prefill_ready=num_prefill, decode_ready=num_decode)
        if self.draining:
            return say(stage="draining", percent=100, reason="The router is shutting down.")
        if self.text is None:
            return say(stage="tokenizer", percent=0, reason="The tokenizer is being loaded.")
        if num_decode and (num_prefill or not self.spec.require_prefill):
            return say(stage="ready", percent=100, reason="")
        if not self.links.map_seen:
            return say(stage="registry", percent=10, reason="The registry has not answered yet.")
        if not known:
            return say(stage="workers", percent=20, reason="No worker has registered yet.")
        percent = 20 + 80 * (num_decode + num_prefill) // (len(known) + 1)
        missing = "prefill" if num_decode else "decode"
        states = ", ".join(
            f"{peer.info.worker_id} {peer.info.state if peer.up else 'unreachable'}" for peer in known[:8]
        )
        return say(stage="loading", percent=percent, reason=f"No {missing} worker is ready: {states}.")

    def limits(self) -> ModelLimits:
        """The limits that hold on every ready decode worker. Raises UnavailableError model_not_ready."""
        infos = [peer.info for peer in self.serving("decode")]
        lengths = [info.max_model_len for info in infos if info.max_model_len]
        has_prefill = not self.spec.require_prefill or bool(self.serving("prefill"))
        if self.draining or self.text is None or not lengths or not has_prefill:  # `readiness` says which
            raise UnavailableError("model_not_ready", retry_after_s=2.0)
        return ModelLimits(max_model_len=min(lengths), vocab_size=min(info.vocab_size for info in infos))

    def check_open(self) -> None:
        """Raises UnavailableError shutting_down."""
        if self.draining:
            raise UnavailableError("shutting_down", retry_after_s=2.0)

    def check_model(self, name: str) -> None:
        """Raises RequestError model_not_found."""
        if name != self.spec.served_model_name:
            raise RequestError("model_not_found", param="model")

    async def measure_lag(self) -> None:
        """Note for ever how late the event loop wakes."""
        while True:
            due = self.clock() + LAG_SAMPLE_S
            await asyncio.sleep(LAG_SAMPLE_S)
            self.metrics.loop_lag.observe(max(self.clock() - due, 0.0))

    async def drain(self, bound_s: float) -> None:
        """Admit nothing more, let what runs finish for `bound_s`, then end the rest with shutting_down."""
        self.draining = True
        until = self.clock() + bound_s
        while self.links.num_requests and (left := until - self.clock()) > 0:
            await self.links.wait_for_end(left)
        if self.links.num_requests:
            log.warning("%d requests did not finish in time; ending them", self.links.num_requests)
            self.links.fail_all("shutting_down")

    def close(self) -> None:
        """Stop the text threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
