"""Figures as JSON and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.bench.session import EngineFigures
from engine.bench.workload import MEASURES, RATIO_MEASURES

_ROUND = 3


def ratios(ours: EngineFigures, theirs: EngineFigures) -> dict[str, float]:
    """How many times their median rate ours is, for the measures that both ran."""
    both = [name for name in RATIO_MEASURES if name in ours.runs and name in theirs.runs]
    return {name: round(ours.median(name) / theirs.median(name), _ROUND) for name in both}


def as_json(figures: Sequence[EngineFigures], about: Mapping[str, object]) -> dict[str, object]:
    """Everything that was measured; `about` is what it was measured on. `ratios` only with two engines."""
    engines = {figure.engine: _engine_json(figure) for figure in figures}
    found: dict[str, object] = {**about, "engines": engines}
    if len(figures) > 1:
        found["ratios"] = ratios(figures[0], figures[1])
    return found


def _engine_json(figure: EngineFigures) -> dict[str, object]:
    rates = {
        name: {
            "value": round(figure.median(name), _ROUND),
            "unit": "tok/s",
            "runs": [round(one, _ROUND) for one in runs],
            "spread": round(figure.spread(name), _ROUND),
        }
        for name, runs in figure.runs.items()
    }
    return {
        **rates,
        "start_s": round(figure.start_s, _ROUND),
        "peak_rss_mib": round(figure.peak_rss_mib, 1),
        "versions": figure.versions,
    }


def table(figures: Sequence[EngineFigures]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows): the median of each measure, and half the range of its runs in per cent."""
    measured = [name for name in MEASURES if any(name in figure.runs for figure in figures)]
    names = ["", *measured, "start", "peak RSS"]
    rows = [
        [
            figure.engine,
            *(_rate(figure, name) for name in measured),
            f"{figure.start_s:.1f} s",
            f"{figure.peak_rss_mib:.0f} MiB",
        ]
        for figure in figures
    ]
    if len(figures) > 1:
        times = ratios(figures[0], figures[1])
        rows.append(["ratio", *(f"{times[name]:.2f}x" if name in times else "" for name in measured), "", ""])
    return names, rows


def _rate(figure: EngineFigures, name: str) -> str:
    if name not in figure.runs:
        return "-"
    value = figure.median(name)
    shown = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return shown if len(figure.runs[name]) == 1 else f"{shown} ±{100 * figure.spread(name):.0f}%"
