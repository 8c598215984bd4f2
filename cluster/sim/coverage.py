"""What a run of many seeds must have shown to mean anything: a simulator that injects nothing finds nothing.

from 300 seeds on      every kind of fault and of corruption struck, 98 % of the orders did, 98 % of the table's cells
                       are filled (the five orders of 300 seeds meet each cell some 4 times), requests mostly finish,
                       and some move and some workers switch
from 10,000 seeds on   no cell is empty, 1,000 corruptions were injected, 100,000 healthy pieces copied
"""

from __future__ import annotations

from cluster.sim.chaos import CELLS, KINDS
from cluster.sim.corruption import KINDS as CORRUPTIONS
from cluster.sim.many import Summary
from cluster.sim.scenario import NUM_FAULTS, NUM_REQUESTS

FEWEST_SEEDS = 300
MANY_SEEDS = 10_000
MOST_EMPTY = 0.02  # of the cells
LEAST_STRUCK = 0.98  # of the orders
LEAST_FINISHED = 0.6  # of the requests
MANY_INJECTED = 1_000
MANY_HEALTHY = 100_000


def gaps(summary: Summary) -> list[str]:
    """What is missing, in words; nothing where there were too few seeds to say."""
    found = []
    if summary.corruption.found != summary.corruption.injected:
        found.append(f"{summary.num_injected} corruptions were injected and {summary.num_found} found")
    if summary.codes.total() != summary.num_seeds * NUM_REQUESTS:
        found.append(f"{summary.codes.total()} requests in {summary.num_seeds} seeds of {NUM_REQUESTS}")
    if summary.num_seeds >= FEWEST_SEEDS:
        found += _gaps_of_some(summary)
    if summary.num_seeds >= MANY_SEEDS:
        found += _gaps_of_many(summary)
    return found


def _gaps_of_some(summary: Summary) -> list[str]:
    found = [f"{kind!r} never struck" for kind in KINDS if kind not in {struck for struck, _ in summary.cells}]
    injected = {kind for kind, _ in summary.corruption.injected}
    found += [f"the corruption {kind!r} was never injected" for kind in CORRUPTIONS if kind not in injected]
    num_orders, num_struck = summary.num_seeds * NUM_FAULTS, summary.cells.total()
    if num_struck < LEAST_STRUCK * num_orders:
        found.append(f"{num_struck} of {num_orders} faults struck")
    num_empty = len(summary.empty_cells)
    if num_empty > MOST_EMPTY * len(CELLS):
        found.append(f"{num_empty} of {len(CELLS)} cells are empty")
    num_finished = summary.codes["finished"]
    if num_finished < LEAST_FINISHED * summary.codes.total():
        found.append(f"only {num_finished} of {summary.codes.total()} requests finished")
    if summary.switches["switched"] < summary.num_seeds or not summary.num_moved:
        found.append(f"{summary.switches['switched']} switches and {summary.num_moved} moved requests are too few")
    return found


def _gaps_of_many(summary: Summary) -> list[str]:
    found = [f"{kind!r} never struck at {stage!r}" for kind, stage in summary.empty_cells]
    if summary.num_injected < MANY_INJECTED:
        found.append(f"{summary.num_injected} corruptions injected, {MANY_INJECTED} are wanted")
    if summary.corruption.num_healthy < MANY_HEALTHY:
        found.append(f"{summary.corruption.num_healthy} healthy pieces copied, {MANY_HEALTHY} are wanted")
    return found
