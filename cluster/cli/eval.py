"""`neap eval`: held-out questions of the embedded model's skills, asked of an engine here or of an endpoint."""

from __future__ import annotations

import asyncio
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.chat import printable
from cluster.config.environment import api_key as key_from_environment
from engine.evaluation.report import Outcome, SkillFigures, as_json, chosen_skills, figures, points_lost, questions
from engine.models.hub import lines_of_progress, model_folder
from engine.tiny.embedded import EMBEDDED_CHECKPOINT
from engine.tiny.skills.example import Example
from engine.tiny.skills.rendering import answer_text

_WIDTH = 100  # where there is no terminal
_SHOWN = 300  # characters of a question or an answer


def evaluate(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder or Hugging Face id. Default: the embedded model.", metavar="MODEL")
    ] = "",
    url: Annotated[str, typer.Option(help="Ask this endpoint instead: http://127.0.0.1:8180/v1.")] = "",
    api_key: Annotated[str, typer.Option(help="Its API key, if it has one (also NEAP_API_KEY).")] = "",
    skills: Annotated[str, typer.Option(help="Some of them: addition,lookup-16. Default: all.")] = "",
    count: Annotated[int, typer.Option(help="Questions of each skill; finite skills have fewer.", min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at once, with --url.", min=1, max=1024)] = 16,
    timeout_s: Annotated[float, typer.Option(help="Of one request, with --url.", min=0.1)] = 120.0,
    show_wrong: Annotated[bool, typer.Option("--show-wrong", help="One wrong answer of each skill.")] = False,
    measures: Annotated[
        bool, typer.Option("--measures", help="Also the experts' load and MTP's agreement (small MoE checkpoints).")
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier --json; fails where a skill has become worse.", metavar="FILE")
    ] = None,
    points: Annotated[float, typer.Option(help="With --compare: percentage points that may be lost.", min=0)] = 0.5,
    json: Annotated[Path | None, typer.Option("--json", help="Write figures and answers.", metavar="FILE")] = None,
) -> None:
    """Ask held-out questions of each skill, greedily, and print exact-match accuracy.

    The questions are those that the embedded model was never trained on. Any model can be asked;
    the column "contained" is for those that answer in other words.
    """
    try:
        if url and (model or measures):
            raise ValueError("--url asks a running endpoint: it goes with neither --model nor --measures")
        earlier = json_module.loads(compare.read_text(encoding="utf-8")) if compare is not None else None
        examples = questions(chosen_skills(skills), count)
        if url:
            options = {"max_tokens": max_tokens, "concurrency": concurrency, "timeout_s": timeout_s}
            found = figures(_endpoint(url, examples, api_key=api_key or key_from_environment(), **options))
        else:
            found = figures(_offline(model, examples, max_tokens))
        if json is not None:
            report = as_json(found, {"target": url or model or "embedded", "count": count, "max_tokens": max_tokens})
            json.write_text(json_module.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        lost = points_lost(found, earlier) if earlier is not None else {}
    except (ValueError, OSError) as error:
        typer.echo(f"neap: {error}", err=True)
        raise typer.Exit(1) from error
    _show(found, lost)
    if show_wrong:
        _show_wrong(found)
    _tell_failures(found)
    if measures:
        _measure(model, examples)
    if any(one > points for one in lost.values()):
        typer.echo(f"neap: worse than {compare} by more than {points:g} points", err=True)
        raise typer.Exit(1)


def _endpoint(url: str, examples: Sequence[Example], **options: Any) -> list[Outcome]:
    # not at the top: the HTTP client takes half a second, which other commands should not wait for
    from cluster.bench.ask_endpoint import AskOptions, ask_endpoint, base_url

    return asyncio.run(ask_endpoint(examples, AskOptions(url=base_url(url), **options), _tell))


def _offline(model: str, examples: Sequence[Example], max_tokens: int) -> list[Outcome]:
    # not at the top: torch, which asking an endpoint does without
    from engine.evaluation.offline import ask_engine
    from engine.llm import LLM

    with LLM(_folder(model)) as llm:
        return ask_engine(llm, examples, max_tokens=max_tokens, tell=_tell)


def _measure(model: str, examples: Sequence[Example]) -> None:
    from engine.evaluation.offline import measured_lines

    try:
        for line in measured_lines(_folder(model), examples):
            typer.echo(line)
    except ValueError as error:
        typer.echo(f"neap: {error}", err=True)
        raise typer.Exit(1) from error


def _folder(model: str) -> Path:
    return model_folder(model, progress=lines_of_progress(model, _tell)) if model else EMBEDDED_CHECKPOINT


def _tell(line: str) -> None:
    typer.echo(f"neap: {line}", err=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _show(found: Sequence[SkillFigures], lost: dict[str, float]) -> None:
    table = Table("skill", title="held-out questions, greedy")
    headings = ["exact", "right", "asked", "contained", "failed", *(["change"] if lost else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(*_row(one.skill, one.correct, one.asked, one.contained, one.failed), *_change(lost, one.skill))
    totals = [sum(getattr(one, name) for one in found) for name in ("correct", "asked", "contained", "failed")]
    table.add_section()
    table.add_row(*_row("all", *totals), *([""] if lost else []))
    _console().print(table)


def _row(name: str, correct: int, asked: int, contained: int, failed: int) -> list[str]:
    return [name, f"{correct / asked:.1%}", str(correct), str(asked), f"{contained / asked:.1%}", str(failed or "")]


def _change(lost: dict[str, float], skill: str) -> list[str]:
    return [f"{0.0 - lost[skill]:+.1f}"] if skill in lost else []


def _show_wrong(found: Sequence[SkillFigures]) -> None:
    for one in found:
        wrong = one.first_wrong
        if wrong is None:
            continue
        last: Any = wrong.example.messages[-2]["content"]
        _console().print(f"\n[bold]{one.skill}[/bold]")
        for name, text in (
            ("asked", last),
            ("expected", answer_text(wrong.example.messages[-1])),
            ("answered", wrong.error or wrong.text),
        ):
            shown = text if len(text) <= _SHOWN else f"... {text[-_SHOWN:]}"
            line = json_module.dumps(printable(shown), ensure_ascii=False)
            _console().print(f"  {name:9}{escape(line)}", highlight=False, soft_wrap=True)


def _tell_failures(found: Sequence[SkillFigures]) -> None:
    for one in found:
        if one.failed:
            reason = next(outcome.error for outcome in one.outcomes if outcome.error)
            _tell(f"{one.skill}: {one.failed} of {one.asked} got no answer, counted as wrong; one: {printable(reason)}")
