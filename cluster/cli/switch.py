"""`neap switch` and `neap drain`: ask the admin API of a cluster to change a worker's role, and tell how it ended.

Exit codes: 0 it is done; 1 no answer; 3 it was refused or rolled back; 4 there is no such worker.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from cluster.config.environment import admin_token
from cluster.control.admin_note import AdminNote, notes
from cluster.control.router_client import RouterClient, RouterError
from engine.config import Role

PATIENCE_S = 320.0  # beyond the longest switch timeout that a worker takes
_CODES = {200: 0, 404: 4, 409: 3}


def find_admin(url: str, token: str) -> RouterClient:
    """A client of the admin API at `url`, which may be a router's too; without one, of the only cluster that runs here.

    The token comes from the option, NEAP_ADMIN_TOKEN, or the note that the cluster has left for its user. Raises
    RouterError if it can't be said which cluster is meant, ValueError for a URL that is none.
    """
    found = notes()
    if url:
        wanted = _plain(RouterClient.at(url).url)
        note = next((one for one in found if wanted in (_plain(one.url), *map(_plain, one.routers))), None)
        return _client(note.url if note else url, token or admin_token() or (note.token if note else ""))
    if len(found) > 1:
        several = ", ".join(f"{one.url} (router {', '.join(one.routers) or 'starting'})" for one in found)
        raise RouterError(f"several clusters run here, say with --url which one: {several}")
    if not found:
        raise RouterError("no cluster of yours runs on this machine; give the admin API's --url and --token")
    return _client(found[0].url, token or admin_token() or found[0].token)


def note_of(router_url: str) -> AdminNote | None:
    """The note of the cluster that this router belongs to, if it runs here."""
    wanted = _plain(router_url)
    return next((note for note in notes() if wanted in map(_plain, note.routers)), None)


def switch(client: RouterClient, worker_id: str, role: Role, *, as_json: bool) -> int:
    """Change a worker's role and print how it ended, in a line. Returns the exit code. Raises RouterError."""
    return _ask(client, f"/v1/workers/{quote(worker_id, safe='')}/switch", {"role": role}, as_json=as_json)


def drain(client: RouterClient, worker_id: str, *, as_json: bool) -> int:
    """Let a worker give everything away and print how it ended. Returns the exit code. Raises RouterError."""
    return _ask(client, f"/v1/workers/{quote(worker_id, safe='')}/drain", {}, as_json=as_json)


def _ask(client: RouterClient, path: str, body: dict[str, Any], *, as_json: bool) -> int:
    code, answer = client.post(path, body, PATIENCE_S)
    if as_json:
        print(json.dumps(answer, indent=2))
    elif code == 200:
        print(answer["words"])
    else:
        error = answer.get("error") or {}
        print(f"{error.get('message')} ({error.get('code')})")
    return _CODES.get(code, 1)


def _client(url: str, token: str) -> RouterClient:
    return RouterClient.at(url, api_key=token)


def _plain(url: str) -> str:
    return url.replace("//localhost", "//127.0.0.1").rstrip("/")
