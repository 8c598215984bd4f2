"""`neap status`: the router's own view of its workers as a table; `--why`: its recent choices in words, and the
planner's, where the admin API of the router's cluster answers.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from cluster.cli.switch import note_of
from cluster.control.router_client import RouterClient, RouterError

_COLUMNS = ("worker", "role", "epoch", "state", "link", "run", "wait", "serve", "KV", "node", "pid")
_NUMBERS = {"epoch", "run", "wait", "serve", "KV"}
MAX_CHANGES = 8
_WIDTH = 140  # where there is no terminal


def status(client: RouterClient, *, as_json: bool) -> int:
    """Print it. Returns 0 if the model can be served now, else 3. Raises RouterError."""
    code, body = client.get("/status")
    if code != 200:
        raise RouterError(error_words(code, body))
    if as_json:
        print(json.dumps(body, indent=2))
    else:
        console = Console()
        show(body, console if console.is_terminal else Console(width=_WIDTH))
    return 0 if body["readiness"]["status"] == "ready" else 3


def why(client: RouterClient, request_id: str, *, as_json: bool) -> int:
    """Print why requests went where they went. Returns 0, or 4 if the request is not known (any more)."""
    code, body = client.get(f"/status/why?request_id={quote(request_id)}")
    if code != 200:
        raise RouterError(error_words(code, body))
    roles = None if request_id else plans(client.url)
    if as_json:
        print(json.dumps(body if roles is None else body | {"roles": roles}, indent=2))
    else:
        console = Console()
        show_why(body, request_id, console if console.is_terminal else Console(width=_WIDTH))
        if roles is not None:
            show_roles(roles, console if console.is_terminal else Console(width=_WIDTH))
    return 0 if body["decisions"] or not request_id else 4


def plans(router_url: str) -> dict[str, Any] | None:
    """What the planner of this router's cluster says; None where it can't be asked."""
    note = note_of(router_url)
    if note is None:
        return None
    try:
        code, body = RouterClient.at(note.url, api_key=note.token).get("/v1/plans")
    except (RouterError, ValueError):
        return None
    return body if code == 200 else None


def show_roles(body: dict[str, Any], console: Console) -> None:
    """The last changes of roles, the newest last, and below them what the planner thinks now."""
    for change in reversed(body["changes"][:MAX_CHANGES]):
        role = f"to {change['role']}" if change["role"] else "drained"
        head = f"{change['worker_id']} {role}, {change['age_s']:.1f} s ago: {change['outcome']}"
        console.print(head, style="bold", highlight=False)
        for line in (change["words"], f"Why: {change['why']}."):
            if line:
                console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    plan = body["plan"]
    automatic = "" if body["auto"] else " (roles.auto is off: only by hand)"
    console.print(f"roles, {plan['age_s']:.1f} s ago{automatic}", style="bold", highlight=False)
    for line in plan["words"]:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def show_why(body: dict[str, Any], request_id: str, console: Console) -> None:
    """A paragraph for each decision, the newest last, where one looks first."""
    if not body["decisions"]:
        words = f"request {request_id} is not among the last decisions" if request_id else "no request has come yet"
        console.print(words, highlight=False)
    for decision in reversed(body["decisions"]):
        head = f"request {decision['request_id']}, {decision['age_s']:.1f} s ago"
        console.print(head, style="bold", highlight=False)
        for line in decision["words"]:
            console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def error_words(code: int, body: dict[str, Any]) -> str:
    """What an error answer says, in one line."""
    error = body.get("error")
    if not isinstance(error, dict):
        return f"the router answered {code}"
    return f"the router answered {code} {error.get('code') or ''}: {error.get('message')}"


def show(body: dict[str, Any], console: Console) -> None:
    """Two lines and a table."""
    readiness, requests = body["readiness"], body["requests"]
    words = readiness["status"] + (f": {readiness['reason']}" if readiness["reason"] else "")
    console.print(f"{body['model']}: {words} (neap {body['version']}, up {body['uptime_s']:.0f} s)", highlight=False)
    console.print(f"requests: {requests['running']} running, {requests['queued']} queued", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for worker in body["workers"]:
        load = worker.get("load") or {}
        state = "hung" if worker.get("hung") else worker["state"]
        cells = [worker["worker_id"], worker["role"], worker["epoch"], state, worker["link"]]
        cells += [load.get(name, "-") for name in ("running", "waiting", "served")]
        cells += [f"{load['kv_use']:.0%}" if "kv_use" in load else "-", worker["node"], worker["pid"]]
        table.add_row(*(str(cell) for cell in cells))
    console.print(table)
