"""The admin API's listener, on the controller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from cluster.config.environment import admin_token
from cluster.config.model import AdminConfig
from cluster.control.admin import admin_app
from cluster.control.admin_note import AdminNote
from cluster.control.roles import Roles

DEFAULT_PORT = 8179  # below the routers' ports, which count up from 8180, and what FastDeploy puts beside them
CLOSE_S = 1.0


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the controller's drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class AdminServer:
    """Serves on the controller's event loop, from start() to stop()."""

    def __init__(
        self, config: AdminConfig, roles: Roles, routers: Callable[[], tuple[str, ...]], *, run_dir: Path
    ) -> None:
        self.token = config.token or admin_token() or secrets.token_urlsafe(32)
        self.url = ""
        self.note_path: Path | None = None
        self._config = config
        self._routers = routers
        self._run_dir = run_dir
        self._noted: tuple[str, ...] | None = None
        options = uvicorn.Config(
            admin_app(roles, self.token, routers),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(CLOSE_S),
        )
        self._server = _Server(options)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError if the port that was asked for is taken."""
        sock = listen(self._config)
        host, port = sock.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[sock]))
        self.write_note()

    def write_note(self) -> None:
        """Write the note, again when other routers are known; in the run folder if there is no other place."""
        routers = self._routers()
        if routers == self._noted:
            return
        self._noted = routers
        note = AdminNote(url=self.url, token=self.token, routers=routers, pid=os.getpid())
        self.note_path = note.write(self._run_dir)

    async def stop(self) -> None:
        """End it, and take the note away."""
        if self.note_path is not None:
            self.note_path.unlink(missing_ok=True)
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait({self._task}, timeout=2 * CLOSE_S)
            self._task.cancel()


def listen(config: AdminConfig) -> socket.socket:
    """The listening socket. Raises OSError if the port that was asked for is taken; unasked, a free one is taken."""
    ports = (config.port,) if config.port else (DEFAULT_PORT, 0)
    host = config.host.strip("[]")
    for port in ports:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen()
            return sock
        except OSError as error:
            sock.close()
            if port == ports[-1]:
                raise OSError(f"admin.port: cannot listen on {host}:{port}: {error.strerror}") from error
    raise AssertionError("the last port either serves or raises")
