"""The commands and their options; what they do is in serve.py, chat.py and status.py."""

from __future__ import annotations

import inspect
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import chat as chat_command
from cluster.cli import serve as serve_command
from cluster.cli import status as status_command
from cluster.cli.bench import bench_app
from cluster.cli.flags import flag_parameters
from cluster.config import ConfigError, Sources, load_config
from cluster.config.environment import api_key as key_from_environment
from cluster.control.router_client import RouterClient, RouterError

app = typer.Typer(
    name="neap",
    help="Serves ERNIE 4.5 with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app)
_FLAGS = flag_parameters()

Url = Annotated[str, typer.Option(help="Where the router listens.")]
Key = Annotated[str, typer.Option(help="Its API key, if it has one (also NEAP_API_KEY).")]
DEFAULT_URL = "http://127.0.0.1:8180"


def serve(path: Path | None, config: Path | None, set_: list[str] | None, **flags: str | bool | None) -> None:
    """Start a cluster on this machine (or on a Ray cluster) and serve a model until ctrl-C.

    PATH is a checkpoint folder; without it a small random model is made. Options come from --config FILE, flags, and
    --set KEY=VALUE, later ones winning.
    """
    given: dict[str, str | bool] = {_FLAGS[name][0]: value for name, value in flags.items() if value is not None}
    if path is not None:
        given["model"] = str(path)
    try:
        cluster = load_config(Sources(file=config, flags=given, sets=set_ or ()))
    except ConfigError as error:
        raise _fail(str(error), 2) from error
    raise typer.Exit(serve_command.serve(cluster))


def _serve_signature() -> inspect.Signature:
    """What typer reads: PATH, --config, --set, and the generated flags."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    path = Annotated[Path | None, typer.Argument(help="Checkpoint folder.", metavar="PATH")]
    config = Annotated[Path | None, typer.Option("--config", help="Cluster file (YAML).", metavar="FILE")]
    set_ = Annotated[
        list[str] | None, typer.Option("--set", help="Any key: pools.0.workers=4. Repeatable.", metavar="KEY=VALUE")
    ]
    own = [
        inspect.Parameter(name, keyword, default=None, annotation=kind)
        for name, kind in (("path", path), ("config", config), ("set_", set_))
    ]
    return inspect.Signature([*own, *(parameter for _, parameter in _FLAGS.values())])


def _register_serve() -> None:
    signature = _serve_signature()
    command: Any = serve
    command.__signature__ = signature
    command.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    app.command()(command)


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
    """Show workers, roles, epochs, states, load and KV use; with --why the choices of the router."""
    try:
        if why or request_id:
            raise typer.Exit(status_command.why(_client(url, api_key), request_id, as_json=json))
        raise typer.Exit(status_command.status(_client(url, api_key), as_json=json))
    except RouterError as error:
        raise _fail(str(error), 1) from error


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


def _client(url: str, api_key: str) -> RouterClient:
    try:
        return RouterClient.at(url, api_key=api_key or key_from_environment())
    except ValueError as error:
        raise _fail(f"--url {url}: {error}", 2) from error


def _fail(message: str, code: int) -> typer.Exit:
    typer.echo(f"neap: {message}" if "\n" not in message else f"neap:\n{message}", err=True)
    return typer.Exit(code)
