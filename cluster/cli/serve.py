"""`neap serve`: makes the backend and the controller, shows how far the start is, and stops everything at the end.

first ctrl-C or SIGTERM   drain: requests in flight finish, new ones get 503
second                    stop at once
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable
from pathlib import Path

from cluster.cli.model_source import checked_model, find_model
from cluster.cli.screen import Screen, make_screen
from cluster.config import ClusterConfig
from cluster.config.environment import prepare_ray
from cluster.control.backend import Backend, LaunchError
from cluster.control.controller import Controller
from cluster.control.process_backend import ProcessBackend

REDRAW_S = 0.2
MAX_PORT = 65535


def serve(config: ClusterConfig) -> int:
    """Serve until a signal. Returns the exit code; what went wrong has been told by then."""
    screen = make_screen()
    run_dir = Path(tempfile.mkdtemp(prefix="neap-"))
    try:
        check_port(config)
        config = checked_model(config)  # a wrong path is told before Ray starts
        code = asyncio.run(_serve(config, run_dir, screen))
    except (LaunchError, OSError, ValueError) as error:
        screen.tell(f"stopped: {error}")
        return 1  # the run folder stays: its logs say more
    shutil.rmtree(run_dir, ignore_errors=True)
    return code


def check_port(config: ClusterConfig) -> None:
    """Find out now, not in half a minute, that a port is taken. Raises ValueError."""
    specs = config.router_specs(model_path="", registry="")
    host = specs[0].host.strip("[]")
    ports = [("port", spec.port) for spec in specs] + [("metrics_port", spec.metrics_port) for spec in specs]
    if both := {spec.port for spec in specs if spec.port} & {spec.metrics_port for spec in specs}:
        raise ValueError(f"router.metrics_port: {min(both)} is router.port already")
    for name, port in ports:
        if port > MAX_PORT:
            raise ValueError(f"router.{name}: {config.routers} routers from this port on end at {port}")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ValueError(f"router.{name}: cannot listen on {host}:{port}: {error.strerror}") from error


def make_backend(config: ClusterConfig, run_dir: Path) -> Backend:
    """The backend that the cluster file asks for."""
    if config.backend == "process":
        return ProcessBackend(run_dir)
    token_path = prepare_ray()
    # not at the top: Ray reads its environment when it is imported, and it takes a second that the rest needs not pay
    from cluster.control.ray_backend import RayBackend

    return RayBackend(
        run_dir,
        address=config.ray.address,
        dashboard_port=config.ray.dashboard_port,
        num_cpus=sum(pool.workers * config.num_cpus(pool) for pool in config.pools),
        token_path=token_path,
    )


async def _serve(config: ClusterConfig, run_dir: Path, screen: Screen) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    backend = make_backend(config, run_dir)
    controller = Controller(config, backend, run_dir=run_dir, tell=screen.tell)
    serving = asyncio.create_task(_start_and_run(find_model(config, screen.tell), controller))
    showing = asyncio.create_task(_show(controller, backend, screen, run_dir))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping, showing), return_when=asyncio.FIRST_COMPLETED)
        if showing.done() and not stop.is_set():
            showing.result()
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (showing, stopping, serving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        screen.close()
        if stop.is_set():
            screen.tell("stopping: requests in flight finish first; press ctrl-C again to stop at once")
        await controller.stop(hurry=hurry)
    if not serving.cancelled():
        serving.result()
    screen.tell("stopped")
    return 0


async def _start_and_run(model_path: Awaitable[str], controller: Controller) -> None:
    await controller.start(model_path)
    await controller.run()


async def _show(controller: Controller, backend: Backend, screen: Screen, run_dir: Path) -> None:
    """Draw the start until the cluster is ready, then the ready box."""
    while not (snapshot := controller.snapshot()).ready:
        screen.draw(snapshot)
        await asyncio.sleep(REDRAW_S)
    screen.close()
    client, spec = controller.router_client(), controller.router_spec
    assert client is not None and spec is not None, "a ready cluster has a router"
    others = ", ".join(f"{other.url}/v1" for other in controller.router_clients()[1:])
    notes = (
        *((("more routers", others),) if others else ()),
        *backend.notes,
        *_admin_notes(controller),
        ("logs", str(run_dir)),
    )
    screen.ready(client, spec.served_model_name, notes)


def _admin_notes(controller: Controller) -> tuple[tuple[str, str], ...]:
    """The token itself is not shown: `neap switch` finds it, and so does who may read the file."""
    admin = controller.admin
    return (("admin API", f"{admin.url} (token in {admin.note_path})" if admin.note_path else admin.url),)
