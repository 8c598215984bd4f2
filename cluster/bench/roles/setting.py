"""What is compared, on what, and against which targets: `roles.json`, committed beside this file, as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cluster.bench.roles.figures import Requests, TraceFigures, load_figures
from engine.scheduler.profile import Profile

FILE = Path(__file__).parent / "roles.json"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of worker. `kv_tokens`: how many tokens its KV memory holds; gb_per_s and latency_ms to its peers."""

    name: str
    profile: Profile
    max_num_seqs: int
    kv_tokens: int
    gb_per_s: float
    latency_ms: float


class StepTables:
    """A Profile's step times at every count, as lists: many times as quick to read as its tables."""

    def __init__(self, hardware: Hardware) -> None:
        profile = hardware.profile
        self.prefill = [profile.prefill_step_ms(num) for num in range(profile.max_step_tokens + 1)]
        self.decode = [profile.decode_step_ms(rows, 0) for rows in range(hardware.max_num_seqs + 1)]
        self.key_ms = profile.prefill_ms_per_token_kilocontext / 1000
        self.row_key_ms = profile.decode_ms_per_row_kilocontext / 1000
        self._chunk = profile.chunk_tokens(profile.max_step_ms)
        self.max_step_ms = max(1.0, profile.max_step_ms)

    def prefill_ms(self, num_tokens: int, num_cached: int) -> float:
        """Profile.prefill_ms."""
        if num_tokens <= 0:
            return 0.0
        table = self.prefill
        ms = self.key_ms * num_tokens * (num_cached + (num_tokens + 1) / 2)
        if num_tokens < len(table) and table[num_tokens] <= self.max_step_ms:
            return ms + table[num_tokens]
        num_full, rest = divmod(num_tokens, self._chunk)
        return ms + num_full * table[self._chunk] + table[rest]


@cache
def tables_of(hardware: Hardware) -> StepTables:
    """One for each kind."""
    return StepTables(hardware)


@dataclass(frozen=True, kw_only=True)
class SwitchCost:
    """What a change of roles takes, in ms: of its own, per moved request beside its bytes, and per call.

    A prompt with at most `finish_ms` to go is finished before a prefill worker changes.
    """

    to_prefill_ms: float = 120.0
    to_decode_ms: float = 140.0
    move_ms: float = 25.0
    finish_ms: float = 20.0
    call_ms: float = 5.0
    timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Traffic of one kind. `rate`: requests per second and worker. Answers are `longer` times those of the trace."""

    trace: str
    rate: float
    longer: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything but the seed, the number of workers and the mode."""

    hardware: dict[str, Hardware]
    machines: str  # the kind that every worker is
    max_model_len: int
    ttft_ms: float
    tpot_ms: float
    phases: tuple[Phase, ...]
    phase_s: float
    rounds: int
    max_outputs_asked: int
    max_queue: int
    heartbeat_s: float
    switch: SwitchCost
    pools: int
    known_outputs: bool = False  # requests ask for exactly what they get, so routers know

    @property
    def seconds(self) -> float:
        """Of the whole load."""
        return self.phase_s * len(self.phases) * self.rounds

    @property
    def kind(self) -> Hardware:
        """What every worker is."""
        return self.hardware[self.machines]

    def scaled(self, factor: float) -> Setting:
        """The same with `factor` times the rates."""
        return replace(self, phases=tuple(replace(phase, rate=phase.rate * factor) for phase in self.phases))


def load_setting(path: Path = FILE) -> Setting:
    """The committed setting, or another file of its form."""
    plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    switch = {name: value for name, value in plain["switch"].items() if name != "why"}
    return Setting(
        hardware={name: _hardware(name, entry) for name, entry in plain["hardware"].items()},
        machines=plain["machines"],
        max_model_len=plain["max_model_len"],
        ttft_ms=plain["ttft_ms"],
        tpot_ms=plain["tpot_ms"],
        phases=tuple(Phase(trace=p["trace"], rate=p["requests_per_s_per_worker"]) for p in plain["phases"]),
        phase_s=plain["phase_s"],
        rounds=plain["rounds"],
        max_outputs_asked=plain["max_outputs_asked"],
        max_queue=plain["router"]["max_queue"],
        heartbeat_s=plain["router"]["heartbeat_s"],
        switch=SwitchCost(**switch),
        pools=plain["planner"]["pools"],
    )


def _hardware(name: str, entry: dict[str, Any]) -> Hardware:
    profile = Profile(
        prefill=tuple((int(x), float(y)) for x, y in entry["prefill"]),
        prefill_ms_per_token_kilocontext=entry["prefill_ms_per_token_kilocontext"],
        decode=tuple((int(x), float(y)) for x, y in entry["decode"]),
        decode_ms_per_row_kilocontext=entry["decode_ms_per_row_kilocontext"],
        max_step_ms=entry["max_step_ms"],
        max_step_tokens=entry["max_step_tokens"],
        kv_token_bytes=entry["kv_token_bytes"],
    )
    return Hardware(
        name=name,
        profile=profile,
        max_num_seqs=entry["max_num_seqs"],
        kv_tokens=entry["kv_tokens"],
        gb_per_s=entry["gb_per_s"],
        latency_ms=entry["latency_ms"],
    )


def shifting_load(setting: Setting, figures: dict[str, TraceFigures], num_workers: int, seed: int) -> Requests:
    """The phases one after the other, `rounds` times over, cut to the model's context."""
    rng = Random(f"neap bench roles {seed}")
    at, prompts, outputs = [], [], []
    for number, phase in enumerate(setting.phases * setting.rounds):
        part = figures[phase.trace].sample(rng, phase.rate * num_workers, setting.phase_s)
        at.append(part.at + number * setting.phase_s)
        prompts.append(part.prompts)
        outputs.append(np.rint(part.outputs * phase.longer).astype(np.int64))
    return cut(
        Requests(at=np.concatenate(at), prompts=np.concatenate(prompts), outputs=np.concatenate(outputs)), setting
    )


def cut(requests: Requests, setting: Setting) -> Requests:
    """Answers and prompts as long as the server takes them."""
    outputs = np.minimum(requests.outputs, setting.max_outputs_asked)
    prompts = np.maximum(1, np.minimum(requests.prompts, setting.max_model_len - outputs))
    return Requests(at=requests.at, prompts=prompts, outputs=outputs)


def replayed_load(setting: Setting, traces: list[Requests], num_workers: int) -> Requests:
    """Recorded traces, not drawn ones: each phase goes on where its trace stopped, sped up to the phase's rate."""
    at, prompts, outputs = [], [], []
    taken = [0] * len(traces)
    for number in range(len(setting.phases) * setting.rounds):
        which = number % len(setting.phases)
        trace, phase = traces[which], setting.phases[which]
        num = max(1, int(phase.rate * num_workers * setting.phase_s))
        index = (taken[which] + np.arange(num)) % len(trace.at)
        taken[which] += num
        gaps = np.diff(trace.at, append=trace.at[-1])[index]
        when = np.concatenate(([0.0], np.cumsum(gaps)[:-1]))
        at.append(number * setting.phase_s + when * (setting.phase_s / max(1e-9, float(when[-1] + gaps[-1]))))
        prompts.append(trace.prompts[index])
        outputs.append(trace.outputs[index])
    return cut(
        Requests(at=np.concatenate(at), prompts=np.concatenate(prompts), outputs=np.concatenate(outputs)), setting
    )


def ideal_rate(setting: Setting, requests: Requests) -> tuple[float, float]:
    """(requests per second and worker if every worker's time could be divided as needed, the share of it for prefill).

    Each worker prefills at full speed, or decodes the most rows whose step is within the TPOT target and that fit.
    """
    hardware, profile = setting.kind, setting.kind.profile
    some = slice(0, 4096)
    prefill_ms = float(np.mean([profile.prefill_ms(int(n), 0) for n in requests.prompts[some]]))
    outputs = float(requests.outputs.mean())
    context = float(np.average(requests.prompts + requests.outputs / 2, weights=requests.outputs))
    rows = min(hardware.max_num_seqs, int(hardware.kv_tokens / context))
    while rows > 1 and profile.decode_step_ms(rows, rows * context) > setting.tpot_ms:
        rows -= 1
    decode_ms = outputs * profile.decode_step_ms(rows, rows * context) / rows
    total_ms = prefill_ms + decode_ms
    return 1000.0 / total_ms, prefill_ms / total_ms


def ideal_of(setting: Setting, number: int) -> dict[str, float]:
    """The load of a phase, over what the workers could do (ideal_rate), and the share of them that should prefill."""
    phase = setting.phases[number]
    alone = replace(setting, phases=(phase,), phase_s=4000 / phase.rate, rounds=1)
    rate, share = ideal_rate(setting, shifting_load(alone, load_figures(), 1, 0))
    return {"load": round(phase.rate / rate, 3), "prefill_share": round(share, 3)}
