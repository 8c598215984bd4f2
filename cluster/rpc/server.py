"""The worker's gRPC server: the two services, grpc.health.v1 and reflection, with the keepalive a client needs."""

from __future__ import annotations

from grpc import aio
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from cluster.rpc.channel import SERVER_OPTIONS
from cluster.rpc.pb import kv_source_pb2, kv_source_pb2_grpc, worker_pb2, worker_pb2_grpc
from cluster.rpc.seal import SealedServer

_SERVICES = (
    worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
    kv_source_pb2.DESCRIPTOR.services_by_name["KVSource"].full_name,
)


class WorkerServer:
    """Serves a worker's services at host:port (0: any free one). Not serving in health's words until `set_serving`."""

    def __init__(
        self, link: worker_pb2_grpc.WorkerServicer, source: kv_source_pb2_grpc.KVSourceServicer, *, host: str, port: int
    ) -> None:
        self._host = host
        self._port = port
        self._server = aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(link, SealedServer(self._server))
        kv_source_pb2_grpc.add_KVSourceServicer_to_server(source, SealedServer(self._server))
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen. Returns host:port. Raises OSError if the port is taken."""
        await self.set_serving(False)
        try:
            self._port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._host}:{self._port}") from error
        await self._server.start()
        return f"{self._host}:{self._port}"

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told, for the server as a whole and for each service."""
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if serving else status.NOT_SERVING
        for name in ("", *_SERVICES):
            await self._health.set(name, value)

    async def stop(self, grace_s: float | None = None) -> None:
        """End every call, at once or after grace_s seconds."""
        await self._server.stop(grace_s)
