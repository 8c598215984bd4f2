"""The admin API: nobody gets in without the token, and every outcome has its status and words."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config.model import AdminConfig
from cluster.control.admin import admin_app
from cluster.control.admin_note import AdminNote, notes
from cluster.control.admin_server import AdminServer, listen
from cluster.control.router_client import RouterClient
from tests.cluster.control.role_rig import Rig, info, three

KEY = {"authorization": "Bearer sesame"}


@asynccontextmanager
async def client_of(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    app = admin_app(rig.roles(), "sesame", lambda: ("http://127.0.0.1:9",))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=KEY, timeout=30) as client:
        yield client


def with_client(rig: Rig, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with client_of(rig) as client:
            await test(client)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "sesame"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer sesam"},
        {"authorization": "Basic sesame"},
        [("authorization", "Bearer sesame"), ("authorization", "Bearer sesame")],
    ],
)
def test_without_the_token_nothing_is_done_and_no_path_told(headers: Any) -> None:
    rig = three()

    async def test(client: httpx.AsyncClient) -> None:
        del client.headers["authorization"]
        for method, path in (("GET", "/v1/workers"), ("POST", "/v1/workers/decode-0/drain"), ("GET", "/nowhere")):
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"

    with_client(rig, test)
    assert not rig.asked


def test_workers_are_listed_switched_and_drained() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/workers")).json()["workers"]
        assert [(one["worker_id"], one["role"]) for one in listed] == [
            ("decode-0", "decode"),
            ("decode-1", "decode"),
            ("prefill-0", "prefill"),
        ]
        switched = (await client.post("/v1/workers/decode-0/switch", json={"role": "prefill"})).json()
        assert (switched["outcome"], switched["moved"], switched["worker"]["role"]) == ("switched", 2, "prefill")
        assert switched["words"].startswith("decode-0 is prefill now")
        drained = (await client.post("/v1/workers/prefill-0/drain")).json()
        assert (drained["outcome"], drained["worker"]["state"]) == ("drained", "draining")

    with_client(three(), test)


def test_what_may_not_be_is_an_error_of_the_catalogue_with_words() -> None:
    rig = three()
    del rig.workers["decode-1"]

    async def test(client: httpx.AsyncClient) -> None:
        for path, body, status, code in (
            ("/v1/workers/decode-0/drain", None, 409, "last_decode_worker"),
            ("/v1/workers/decode-0/switch", {"role": "prefill"}, 409, "last_decode_worker"),
            ("/v1/workers/nobody/drain", None, 404, "worker_not_found"),
            ("/v1/workers/decode-0/switch", {"role": "king"}, 400, "invalid_value"),
            ("/v1/workers/decode-0/switch", {"role": "decode", "now": 1}, 400, "invalid_value"),
            ("/v1/workers/decode-0/switch", None, 400, "invalid_value"),
            ("/v1/workers/decode-0/burn", None, 404, "not_found"),
            ("/v1/workers", None, 405, "method_not_allowed"),
        ):
            answer = await client.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code) and error["message"]
        long = await client.post("/v1/workers/decode-0/switch", content=b"x" * 5000)
        assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")

    with_client(rig, test)
    assert not rig.asked


@pytest.mark.parametrize(
    ("reply", "broken", "status"),
    [({"outcome": "refused"}, False, 409), ({"outcome": "rolled_back"}, False, 409), ({}, True, 502)],
)
def test_a_change_that_came_to_nothing_is_an_error_too(reply: dict[str, Any], broken: bool, status: int) -> None:
    rig = three(reply=reply | ({"info": info("decode-0", "decode")} if reply else {}), broken=broken)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/workers/decode-0/switch", json={"role": "prefill"})
        assert answer.status_code == status and "decode-0" in answer.json()["error"]["message"]

    with_client(rig, test)


def test_plans_and_changes_are_told_newest_first() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for role in ("prefill", "decode"):
            await client.post("/v1/workers/decode-0/switch", json={"role": role})
        body = (await client.get("/v1/plans")).json()
        assert [change["role"] for change in body["changes"]] == ["decode", "prefill"]
        assert body["changes"][0]["outcome"] == "switched" and body["changes"][0]["why"] == "asked for"
        assert body["auto"] is True and body["routers"] == ["http://127.0.0.1:9"] and body["plan"]["words"] == []

    with_client(three(), test)


def modes(folder: Path) -> list[int]:
    """Of the folder and what lies in it."""
    return [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())]


def test_it_listens_leaves_a_note_for_its_user_only_and_takes_it_away(own_state: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        rig, routers = three(), ["http://127.0.0.1:9"]
        server = AdminServer(AdminConfig(), rig.roles(), lambda: tuple(routers), run_dir=tmp_path)
        await server.start()
        (note,) = notes()
        assert (note.url, note.token, note.routers) == (server.url, server.token, ("http://127.0.0.1:9",))
        assert modes(own_state) == [0o700, 0o600] and len(note.token) > 30
        routers.append("http://127.0.0.1:10")
        server.write_note()
        assert len(notes()[0].routers) == 2
        client = RouterClient.at(note.url, api_key=note.token)
        code, body = await asyncio.to_thread(client.get, "/v1/workers")
        assert code == 200 and len(body["workers"]) == 3
        code, body = await asyncio.to_thread(client.post, "/v1/workers/decode-0/switch", {"role": "prefill"})
        assert code == 200 and body["outcome"] == "switched"
        assert (await asyncio.to_thread(replace(client, api_key="x").get, "/v1/workers"))[0] == 401
        await server.stop()
        assert notes() == () and modes(own_state) == [0o700]

    asyncio.run(scenario())


def test_the_token_comes_from_the_file_or_the_environment_if_it_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def token(config: AdminConfig) -> str:
        return AdminServer(config, three().roles(), tuple, run_dir=tmp_path).token

    assert token(AdminConfig()) != token(AdminConfig())
    monkeypatch.setenv("NEAP_ADMIN_TOKEN", "from-environment")
    assert token(AdminConfig()) == "from-environment"
    assert token(AdminConfig(token="from-file")) == "from-file"


def test_a_port_that_was_asked_for_must_be_free_and_an_unasked_one_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"admin.port: cannot listen on 127.0.0.1:{port}"):
            listen(AdminConfig(port=port))
    first = listen(AdminConfig())
    with first, listen(AdminConfig()) as second:
        assert second.getsockname()[1] not in (0, first.getsockname()[1])


def test_notes_of_the_dead_and_of_others_are_not_taken_for_clusters(own_state: Path, tmp_path: Path) -> None:
    assert notes() == ()
    alive = AdminNote(url="http://127.0.0.1:1", token="t", routers=(), pid=os.getpid())
    assert alive.write(tmp_path) == own_state / f"admin-{os.getpid()}.json"
    dead = replace(alive, pid=2**22 + 5)  # above the largest pid
    assert dead.write(tmp_path) is not None
    (own_state / "admin-1.json").write_text("{")
    (own_state / "admin-2.json").write_text(json.dumps(["url"]))
    assert notes() == (alive,)
    assert not (own_state / f"admin-{dead.pid}.json").exists()


def test_without_a_state_folder_the_note_lies_in_the_run_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEAP_STATE", str(tmp_path / "file"))
    note = AdminNote(url="http://127.0.0.1:1", token="t", routers=(), pid=7)
    assert note.write(tmp_path / "run") == tmp_path / "run" / "admin-7.json"
    assert note.write(tmp_path / "file") is None
