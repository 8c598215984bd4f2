"""The commands and their options; what they do is in serve.py, chat.py, status.py and switch.py."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import chat as chat_command
from cluster.cli import sim as sim_command
from cluster.cli import status as status_command
from cluster.cli import switch as switch_command
from cluster.cli.bench import bench_app
from cluster.cli.eval import evaluate
from cluster.cli.flags import flag_parameters
from cluster.cli.foreign import foreign_parameters, our_flag_value, settle_flags
from cluster.config import ConfigError, Sources, load_config
from cluster.config.environment import api_key as key_from_environment
from cluster.control.router_client import RouterClient, RouterError
from engine.config import Role

app = typer.Typer(
    name="neap",
    help="Serves ERNIE 4.5 with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app)
app.command("sim")(sim_command.sim)
app.command("eval")(evaluate)
_FLAGS = flag_parameters()
_FOREIGN = foreign_parameters(_FLAGS)

Url = Annotated[str, typer.Option(help="Where the router listens.")]
Key = Annotated[str, typer.Option(help="Its API key, if it has one (also NEAP_API_KEY).")]
DEFAULT_URL = "http://127.0.0.1:8180"


def serve(
    path: str | None, model: str | None, config: Path | None, set_: list[str] | None, **flags: str | bool | None
) -> None:
    """Start a cluster on this machine (or on a Ray cluster) and serve a model until ctrl-C.

    Without MODEL the small one that comes with neap. Later ones win: --config FILE, flags, --set.

    Options of FastDeploy's and vLLM's commands are understood too (dashes or
    underscores): what has no meaning here is told, what is not built yet refused.
    """
    settled = settle_flags(
        _FOREIGN,
        {name: flags.pop(name) for name in _FOREIGN},
        {name: key for name, (key, _) in _FLAGS.items()},
    )
    if path is not None and model is not None and path != model:
        settled.refusals.append(f"--model {model}: the model is given as {path} already")
    if settled.refusals:
        raise _fail("\n".join(settled.refusals), 2)
    if settled.notices:
        typer.echo(f"neap: no meaning here, ignored: {', '.join(settled.notices)}", err=True)
    own = {_FLAGS[name][0]: value for name, value in flags.items() if value is not None}
    given = {key: our_flag_value(key, value) for key, value in (settled.ours | own).items()}
    if (chosen := path or model) is not None:
        given["model"] = chosen
    try:
        cluster = load_config(Sources(file=config, flags=given, sets=set_ or ()))
    except ConfigError as error:
        raise _fail(str(error), 2) from error
    from cluster.cli import serve as serve_command  # what runs a cluster takes a second to load, which others need not

    raise typer.Exit(serve_command.serve(cluster))


def _serve_signature() -> inspect.Signature:
    """What typer reads: MODEL, --config, --set, and the generated flags."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    path = Annotated[str | None, typer.Argument(help="Checkpoint folder or Hugging Face id.", metavar="MODEL")]
    model = Annotated[str | None, typer.Option("--model", help="The same, as an option.", metavar="MODEL")]
    config = Annotated[Path | None, typer.Option("--config", help="Cluster file (YAML).", metavar="FILE")]
    set_ = Annotated[
        list[str] | None, typer.Option("--set", help="Any key: pools.0.workers=4. Repeatable.", metavar="KEY=VALUE")
    ]
    own = [
        inspect.Parameter(name, keyword, default=None, annotation=kind)
        for name, kind in (("path", path), ("model", model), ("config", config), ("set_", set_))
    ]
    generated = [*_FLAGS.values(), *_FOREIGN.values()]
    return inspect.Signature([*own, *(parameter for _, parameter in generated)])


def _register_serve() -> None:
    signature = _serve_signature()
    command: Any = serve
    command.__signature__ = signature
    command.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    # --max_model_len is --max-model-len: FastDeploy and vLLM take both
    app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(command)


_register_serve()


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    model: Annotated[str, typer.Option(help="Default: the one that is served.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float | None, typer.Option(help="Default: the model's.", min=0.0)] = None,
) -> None:
    """Talk to a model. With piped input: answer it once and exit."""
    options = chat_command.ChatOptions(model=model, system=system, max_tokens=max_tokens, temperature=temperature)
    try:
        raise typer.Exit(chat_command.chat(_client(url, api_key), options))
    except RouterError as error:
        raise _fail(str(error), 1) from error


@app.command()
def status(
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    json: Annotated[bool, typer.Option("--json", help="The router's answer as it is.")] = False,
    why: Annotated[bool, typer.Option("--why", help="Tell why recent requests went where they went.")] = False,
    request_id: Annotated[str, typer.Argument(help="With --why: only this request (its x-request-id or id).")] = "",
) -> None:
    """Show workers, roles, epochs, states, load and KV use; with --why the choices of the router and of the planner."""
    try:
        if why or request_id:
            raise typer.Exit(status_command.why(_client(url, api_key), request_id, as_json=json))
        raise typer.Exit(status_command.status(_client(url, api_key), as_json=json))
    except RouterError as error:
        raise _fail(str(error), 1) from error


AdminUrl = Annotated[str, typer.Option(help="Admin API, or a router. Default: the cluster that runs here.")]
Token = Annotated[str, typer.Option(help="Of the admin API (also NEAP_ADMIN_TOKEN). Default: found if it runs here.")]
Worker = Annotated[str, typer.Argument(help="Its id, as in neap status.", metavar="WORKER")]
Json = Annotated[bool, typer.Option("--json", help="The answer as it is.")]


@app.command()
def switch(
    worker: Worker,
    to: Annotated[str, typer.Option("--to", help="prefill or decode.", metavar="ROLE")],
    url: AdminUrl = "",
    token: Token = "",
    json: Json = False,
) -> None:
    """Change a worker's role while it serves; its running requests finish or move. Also ends a drain."""
    if to not in ("prefill", "decode"):
        raise _fail(f'--to {to}: expected "prefill" or "decode"', 2)
    role: Role = "prefill" if to == "prefill" else "decode"
    with _admin(url, token) as client:
        raise typer.Exit(switch_command.switch(client, worker, role, as_json=json))


@app.command()
def drain(worker: Worker, url: AdminUrl = "", token: Token = "", json: Json = False) -> None:
    """Let a worker give all its requests away and take no new ones, until `neap switch` brings it back."""
    with _admin(url, token) as client:
        raise typer.Exit(switch_command.drain(client, worker, as_json=json))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"neap {metadata.version('neap-serve')} (Python {sys.version.split()[0]})")


def main() -> None:
    """The `neap` command."""
    try:
        app(prog_name="neap")
    except KeyboardInterrupt:  # before a command has its own way with ctrl-C
        sys.exit(130)


@contextmanager
def _admin(url: str, token: str) -> Iterator[RouterClient]:
    """A client of the admin API; what goes wrong with it is told."""
    try:
        yield switch_command.find_admin(url, token)
    except RouterError as error:
        raise _fail(str(error), 1) from error
    except ValueError as error:
        raise _fail(f"--url {url}: {error}", 2) from error


def _client(url: str, api_key: str) -> RouterClient:
    try:
        return RouterClient.at(url, api_key=api_key or key_from_environment())
    except ValueError as error:
        raise _fail(f"--url {url}: {error}", 2) from error


def _fail(message: str, code: int) -> typer.Exit:
    typer.echo(f"neap: {message}" if "\n" not in message else f"neap:\n{message}", err=True)
    return typer.Exit(code)
