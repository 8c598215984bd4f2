"""Every option of a cluster, as one pydantic model. The command line's flags are generated from it.

Options of an engine, a router and the fake are defined where they are used (engine/config.py, cluster/spec.py) and
derived here by name, type and default; this file adds what only the cluster file knows, and a line of help for each.

    model, backend, ...   the whole cluster
    engine                options of every worker's engine
    pools[i]              role and number of workers; any engine option here overrides `engine` for this pool
    roles, admin          when workers change their roles, and the API to change them by hand
    router, ray, fake     the HTTP side; Ray; the exact fake model instead of a checkpoint (tests, benchmarks)
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from cluster.config import environment
from cluster.config.help import HELP
from cluster.spec import FakeSpec, RolesSpec, RouterSpec, WorkerSpec
from engine.config import EngineConfig, Role

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {f"{letter}ib": _UNITS[letter] for letter in "kmgt"}


def parse_size(value: object) -> object:
    """Bytes from "512MiB", "4 GB", "16k" (k, m, g, t alone are binary); other types pass through to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f'expected a size such as 512MiB or 4GB, got "{value}"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_count(value: object) -> object:
    """Tokens from "32768", "32k" (thousands) or "32K" (times 1024), as vLLM reads them; other types pass through."""
    if not isinstance(value, str) or (match := re.fullmatch(r"\s*([0-9]+)\s*([kKmM])\s*", value)) is None:
        return value
    return int(match[1]) * {"k": 10**3, "K": 1 << 10, "m": 10**6, "M": 1 << 20}[match[2]]


def _number(value: object) -> object:
    """Literal[0, 1] takes no "1"; flags and --set bring text."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1)]
_SIZES = {"kv_cache_bytes", "max_body_bytes", "stream_buffer_bytes"}
_TOKEN_COUNTS = {"max_model_len", "max_batched_tokens"}
_AT_LEAST_ONE = {"max_queue", "max_running", "num_blocks", "vocab_size", "max_switches"}
_MORE_THAN_NOTHING = {"ttft_ms", "tpot_ms", "interval_s", "horizon_s", "switch_timeout_s", "traffic_window_s"}
_AT_LEAST_NOTHING = {"act_at", "hysteresis", "min_role_s"}


def _field_type(name: str, hint: Any) -> Any:
    if name in _SIZES:
        return Size
    if name in _TOKEN_COUNTS:
        return Annotated[int, BeforeValidator(parse_count)]
    if name in ("port", "metrics_port"):
        return Annotated[int, Field(ge=0, le=65535)]
    if name in _AT_LEAST_ONE:
        return Annotated[int, Field(ge=1)]
    if name in _MORE_THAN_NOTHING:
        return Annotated[float, Field(gt=0, allow_inf_nan=False)]
    if name in _AT_LEAST_NOTHING:
        return Annotated[float, Field(ge=0, allow_inf_nan=False)]
    if name == "policy":
        return Literal["predicted", "prefix-aware", "least-loaded", "power-of-two", "round-robin"]
    if name == "steps_in_flight":
        return Annotated[hint, BeforeValidator(_number)]
    return hint


def _derived(source: Any, section: str, leave: set[str], *, overrides: bool = False) -> dict[str, Any]:
    """Field definitions for create_model from a dataclass or msgspec Struct; with `overrides` all default to None."""
    hints = get_type_hints(source)
    if dataclasses.is_dataclass(source):
        defaults = {f.name: f.default for f in dataclasses.fields(source)}
    else:
        defaults = {f.name: f.default for f in msgspec.structs.fields(source)}
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        if name not in leave:
            kind = _field_type(name, hints[name])
            field = Field(default=None if overrides else default, description=HELP[f"{section}.{name}"])
            fields[name] = (kind | None if overrides else kind, field)
    return fields


def is_loopback(host: str) -> bool:
    """True if only this machine reaches a listener on `host`. Unknown names count as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


_NOT_OF_ENGINE = {"model", "served_model_name", "role"}
_NOT_OF_ROUTER = {"router_id", "model_path", "served_model_name", "registry", "host", "api_key"}


class _Pool(_Section):
    name: str = Field(
        default="", pattern=r"^[a-z0-9-]*$", description="Names its workers (name-0, ...). Default: role."
    )
    role: Role = Field(description="What its workers start as: prefill or decode.")
    workers: int = Field(default=1, ge=1, description="Number of workers.")
    num_cpus: float | None = Field(
        default=None, ge=0, description="CPUs Ray reserves per worker. Default: threads, 1 if those are 0."
    )
    num_gpus: float = Field(default=0, ge=0, description="GPUs Ray reserves per worker.")
    accelerator_type: str = Field(default="", description="Ray accelerator type a worker must lie on, such as H100.")
    fake_slowdown: float = Field(default=1.0, gt=0, description="With fake: how many times slower these workers are.")


class _Router(_Section):
    host: str = Field(default="127.0.0.1", description=HELP["router.host"])
    api_key: str = Field(default="", repr=False, description=HELP["router.api_key"])
    insecure: bool = Field(default=False, description="Listen beyond this machine without an API key.")

    @model_validator(mode="after")
    def _beyond_loopback_wants_a_key(self) -> _Router:
        if not (is_loopback(self.host) or self.api_key or environment.api_key() or self.insecure):
            raise ValueError(f"router.host: {self.host} can be reached from outside: give --api-key (or --insecure)")
        return self


if TYPE_CHECKING:  # mypy sees the bases; the derived fields exist only at run time
    EngineSection = _Section
    FakeSection = _Section
    PoolConfig = _Pool
    RouterConfig = _Router
    RolesConfig = _Section
else:
    EngineSection = create_model("EngineSection", __base__=_Section, **_derived(EngineConfig, "engine", _NOT_OF_ENGINE))
    FakeSection = create_model("FakeSection", __base__=_Section, **_derived(FakeSpec, "fake", set()))
    PoolConfig = create_model(
        "PoolConfig", __base__=_Pool, **_derived(EngineConfig, "engine", _NOT_OF_ENGINE, overrides=True)
    )
    RolesConfig = create_model("RolesConfig", __base__=_Section, **_derived(RolesSpec, "roles", set()))
    RouterConfig = create_model("RouterConfig", __base__=_Router, **_derived(RouterSpec, "router", _NOT_OF_ROUTER))


class RayConfig(_Section):
    """How neap uses Ray. Ray's ports bind all interfaces, so its token authentication is always on."""

    address: str = Field(default="", description="Join the Ray cluster at this address. Default: start a local one.")
    dashboard_port: int = Field(
        default=0, ge=0, le=65535, description="Port of Ray's dashboard on 127.0.0.1; 0: 8265 or the next free one."
    )


class AdminConfig(_Section):
    """The admin API of the controller. It always wants a token, wherever it listens."""

    host: str = Field(default="127.0.0.1", description="Address the admin API listens on.")
    port: int = Field(
        default=0, ge=0, le=65535, description="Port of the admin API; 0: 8179, or a free one if that is taken."
    )
    token: str = Field(
        default="", repr=False, description="Bearer token (also NEAP_ADMIN_TOKEN). Default: made at each start."
    )


class ClusterConfig(_Section):
    """The cluster file."""

    model: str = Field(default="", description="Checkpoint folder or Hugging Face id. Default: the embedded one.")
    revision: str = Field(default="", description="Branch, tag or commit of a Hugging Face model. Default: main.")
    served_model_name: str = Field(default="", description="Name clients use. Default: the id or the folder's name.")
    backend: Literal["ray", "process"] = Field(
        default="ray", description="ray: actors place and restart workers. process: plain processes, this machine only."
    )
    worker_host: str = Field(
        default="127.0.0.1",
        description="Address workers and registry listen on (no authentication there); auto: each node's own.",
    )
    registry: str = Field(
        default="",
        pattern=r"^(rediss?://\S+)?$",
        description="Redis that keeps the map of workers, redis://HOST:PORT/DB. Default: the controller keeps it.",
    )
    routers: int = Field(default=1, ge=1, le=64, description="Routers, on consecutive ports from router.port on.")
    engine: EngineSection = Field(default=EngineSection(), description="Options of every engine.")
    pools: tuple[PoolConfig, ...] = Field(
        default=(PoolConfig(role="prefill"), PoolConfig(role="decode")), description="Groups of workers."
    )
    router: RouterConfig = Field(default=RouterConfig(), description="The HTTP side.")
    roles: RolesConfig = Field(default=RolesConfig(), description="When workers change their roles.")
    admin: AdminConfig = Field(default=AdminConfig(), description="The API to change roles by hand.")
    ray: RayConfig = Field(default=RayConfig(), description="How Ray is used.")
    fake: FakeSection | None = Field(default=None, description="Run the exact fake model instead of the checkpoint.")

    def model_post_init(self, context: Any) -> None:
        """Check what no single key decides. Raises ValueError that begins with the key."""
        names = [self.pool_name(pool) for pool in self.pools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f'pools.{index}.name: "{name}" is taken by another pool; give this one a name')
        if not any(pool.role == "decode" for pool in self.pools):
            raise ValueError("pools: at least one pool needs role decode, else nothing can answer")
        for index, pool in enumerate(self.pools):
            options = self.engine_options(pool)
            try:
                EngineConfig(model="", **options)
            except ValueError as error:
                name = str(error).split()[0]
                where = f"pools.{index}.{name}" if getattr(pool, name, None) is not None else f"engine.{name}"
                raise ValueError(f"{where}: {error}") from error

    def pool_name(self, pool: _Pool) -> str:
        """Its name, or its role if it has none."""
        return pool.name or pool.role

    def pool(self, name: str) -> _Pool:
        """The pool of that name."""
        return next(pool for pool in self.pools if self.pool_name(pool) == name)

    def engine_options(self, pool: _Pool) -> dict[str, Any]:
        """EngineConfig's keywords for this pool's workers, without the model."""
        own = {name: getattr(pool, name) for name in EngineSection.model_fields}
        shared = self.engine.model_dump()
        options = {"role": pool.role, **{n: shared[n] if own[n] is None else own[n] for n in own}}
        if options["kernels"] == "auto":
            options["kernels"] = environment.kernels()
        return {**options, "kernel_cache": options["kernel_cache"] or environment.kernel_cache()}

    def model_name(self, model_path: str) -> str:
        """What clients call the model."""
        return self.served_model_name or Path(model_path).resolve().name

    def worker_specs(self, *, model_path: str, registry: str, log_dir: str) -> tuple[WorkerSpec, ...]:
        """One spec per worker, pools in order. model_path: the checkpoint, made or given; registry: host:port."""
        name = self.model_name(model_path)
        return tuple(
            WorkerSpec(
                worker_id=f"{self.pool_name(pool)}-{index}",
                pool=self.pool_name(pool),
                role=pool.role,
                engine=EngineConfig(model=model_path, served_model_name=name, **self.engine_options(pool)),
                fake=self._fake_spec(pool.fake_slowdown),
                host=self.worker_host,
                registry=registry,
                log_dir=log_dir,
            )
            for pool in self.pools
            for index in range(pool.workers)
        )

    def _fake_spec(self, slowdown: float) -> FakeSpec | None:
        if self.fake is None:
            return None
        fake = FakeSpec(**self.fake.model_dump())
        return msgspec.structs.replace(
            fake, fixed_ms=fake.fixed_ms * slowdown, ms_per_token=fake.ms_per_token * slowdown
        )

    def router_specs(self, *, model_path: str, registry: str) -> tuple[RouterSpec, ...]:
        """One spec per router. The API key comes from the file or flag, else from NEAP_API_KEY; port 0 is any port."""
        options = self.router.model_dump(exclude={"insecure", "api_key"})
        port, metrics_port = options.pop("port"), options.pop("metrics_port")
        return tuple(
            RouterSpec(
                router_id=f"router-{secrets.token_hex(4)}",
                model_path=model_path,
                served_model_name=self.model_name(model_path),
                registry=registry,
                api_key=self.router.api_key or environment.api_key(),
                port=port and port + index,
                metrics_port=metrics_port and metrics_port + index,
                **options,
            )
            for index in range(self.routers)
        )

    def roles_spec(self) -> RolesSpec:
        """What the planner is to keep to."""
        return RolesSpec(**self.roles.model_dump())

    def num_cpus(self, pool: _Pool) -> float:
        """CPUs that one worker of this pool reserves."""
        return float(self.engine_options(pool)["threads"] or 1) if pool.num_cpus is None else pool.num_cpus
