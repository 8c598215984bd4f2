"""The cluster file: defaults, sources, sizes, and errors that name the key and the place."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import msgspec
import pytest
import yaml

from cluster.config import ConfigError, Sources, load_config
from cluster.config.help import HELP
from cluster.config.model import is_loopback, parse_size
from cluster.spec import RolesSpec, RouterSpec, WorkerSpec
from engine.config import EngineConfig


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEAP_API_KEY", raising=False)


def specs(sources: Sources) -> tuple[WorkerSpec, ...]:
    return load_config(sources).worker_specs(model_path="/m/tiny", registry="127.0.0.1:1", log_dir="/logs")


def error_of(sources: Sources) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(sources)
    return str(caught.value)


def test_without_anything_there_is_one_prefill_and_one_decode_worker_with_the_engine_s_defaults() -> None:
    workers = specs(Sources())
    assert [(w.worker_id, w.role) for w in workers] == [("prefill-0", "prefill"), ("decode-0", "decode")]
    for worker in workers:
        assert worker.engine == EngineConfig(model="/m/tiny", served_model_name="tiny", role=worker.role)
        assert worker.host == "127.0.0.1"
        assert worker.fake is None
    router = load_config(Sources()).router_specs(model_path="/m/tiny", registry="127.0.0.1:1")[0]
    expected = RouterSpec(
        router_id=router.router_id, model_path="/m/tiny", served_model_name="tiny", registry="127.0.0.1:1"
    )
    assert router == expected


def test_every_option_of_an_engine_and_a_router_can_be_set_and_has_help() -> None:
    config = load_config(Sources())
    engine = {f.name for f in dataclasses.fields(EngineConfig)} - {"model", "served_model_name", "role"}
    assert engine == set(type(config.engine).model_fields) <= set(type(config.pools[0]).model_fields)
    router = {f.name for f in msgspec.structs.fields(RouterSpec)} - {"router_id", "model_path", "registry"}
    assert router - {"served_model_name"} < set(type(config.router).model_fields)
    used = {f"{section}.{name}" for section, names in (("engine", engine), ("router", router)) for name in names}
    assert used - {"router.served_model_name"} <= HELP.keys()


def test_every_option_of_the_planner_can_be_set_has_help_and_bounds() -> None:
    names = {f.name for f in msgspec.structs.fields(RolesSpec)}
    assert {f"roles.{name}" for name in names} <= HELP.keys()
    assert load_config(Sources()).roles_spec() == RolesSpec()
    flags = {"roles.ttft_ms": "250", "roles.auto": False, "admin.port": "9000"}
    config = load_config(Sources(flags=flags, sets=["roles.max_switches=2"]))
    assert config.roles_spec() == RolesSpec(auto=False, ttft_ms=250.0, max_switches=2)
    assert config.admin.port == 9000 and config.admin.host == "127.0.0.1"
    assert error_of(Sources(flags={"roles.tpot_ms": "0"})).startswith("--roles-tpot-ms: roles.tpot_ms: expected")
    assert "roles.interval_s" in error_of(Sources(sets=["roles.interval_s=nan"]))
    assert "did you mean hysteresis?" in error_of(Sources(sets=["roles.hystereses=1"]))
    assert "secret" not in repr(load_config(Sources(flags={"admin.token": "secret"})))


def test_the_readme_of_the_controller_shows_the_planner_s_real_defaults() -> None:
    text = (Path(__file__).parents[2] / "cluster" / "control" / "README.md").read_text(encoding="utf-8")
    block = textwrap.dedent(text[text.index("    roles:\n") : text.index("By hand, on the machine")])
    shown = yaml.safe_load(block)
    assert shown["roles"] == msgspec.structs.asdict(RolesSpec())
    assert shown["admin"] == load_config(Sources()).admin.model_dump()


def test_later_sources_win_and_pools_override_the_engine_section(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "engine: {max_num_seqs: 8, kv_cache_bytes: 64MiB}\n"
        "pools:\n  - {role: prefill, name: p}\n  - {role: decode, max_num_seqs: 99}\n"
        "router: {port: 9000}\n"
    )
    sources = Sources(
        file=file,
        flags={"engine.max_num_seqs": "16", "router.port": "9001"},
        sets=["pools.0.workers=2", "router.port=9"],
    )
    workers = specs(sources)
    assert [(w.worker_id, w.engine.max_num_seqs) for w in workers] == [("p-0", 16), ("p-1", 16), ("decode-0", 99)]
    assert {w.engine.kv_cache_bytes for w in workers} == {64 << 20}
    assert load_config(sources).router.model_dump()["port"] == 9


def test_set_starts_from_the_default_pools_and_may_append_one() -> None:
    workers = specs(Sources(sets=["pools.2.role=decode", "pools.2.name=big", "pools.1.workers=2"]))
    assert [w.worker_id for w in workers] == ["prefill-0", "decode-0", "decode-1", "big-0"]


def test_the_fake_takes_the_place_of_the_checkpoint() -> None:
    workers = specs(Sources(sets=["fake.vocab_size=300", "fake.ms_per_token=0.5"]))
    assert all(w.fake is not None and (w.fake.vocab_size, w.fake.ms_per_token) == (300, 0.5) for w in workers)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: /m\nrouter:\n  port: many\n", 3, "router.port: expected a valid integer"),
        ("pools:\n  - role: decode\n    worker: 3\n", 3, "pools.0.worker: there is no such key; did you mean workers?"),
        ("pools:\n  - role: decode\n  - workers: 3\n", 3, "pools.1.role: is missing"),
        ("pools:\n  - role: decode\n  - role: decode\n", 3, 'pools.1.name: "decode" is taken'),
        ("engine:\n  threads: -1\n", 2, "engine.threads: threads must be at least 0, got -1"),
        ("pools:\n  - role: decode\n    threads: -1\n", 3, "pools.0.threads: threads must be at least 0, got -1"),
        ("engine:\n  kv_cache_bytes: 5 parsecs\n", 2, "engine.kv_cache_bytes: expected a size such as 512MiB"),
        ("model: /m\n\nmodel: /n\n", 3, "model: stands here again"),
        ("model: /m\nrouter: [\n", 3, "not valid YAML"),
        ("- a\n", 1, "expected keys and values"),
        ("pools: [{role: prefill}]\n", 1, "pools: at least one pool needs role decode"),
        ("router:\n  host: 0.0.0.0\n", 2, "router.host: 0.0.0.0 can be reached from outside: give --api-key"),
        ("backend: slurm\n", 1, "backend: expected 'ray' or 'process', got 'slurm'"),
        ("colour: red\n", 1, "colour: there is no such key; known here: admin, backend"),
    ],
)
def test_an_error_in_the_file_names_the_key_and_the_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    message = error_of(Sources(file=file))
    assert message.startswith(f"{file}:{line}: ")
    assert said in message


def test_all_errors_are_told_at_once() -> None:
    message = error_of(Sources(flags={"router.port": "70000"}, sets=["engine.dtype=int3", "pools.9.workers=1"][:1]))
    assert [line.split(":")[0] for line in message.splitlines()] == ["--set engine.dtype=int3", "--port"]


@pytest.mark.parametrize("text", ["pools.0.workers", "=4", "pools.9.workers=4", "model.deep.key=1", "router.port=[1"])
def test_a_wrong_set_is_told_with_its_text(text: str) -> None:
    assert error_of(Sources(sets=[text])).startswith(f"--set {text}")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(Sources(file=tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(Sources(file=tmp_path / "binary"))


def test_beyond_loopback_a_key_or_insecure_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    host: dict[str, str | bool] = {"router.host": "0.0.0.0"}
    assert "--api-key" in error_of(Sources(flags=host))
    load_config(Sources(flags={**host, "router.insecure": True}))
    load_config(Sources(flags={**host, "router.api_key": "secret"}))
    monkeypatch.setenv("NEAP_API_KEY", "from-outside")
    config = load_config(Sources(flags=host))
    assert config.router_specs(model_path="/m", registry="")[0].api_key == "from-outside"
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "[::1]", "localhost", "10.0.0.1", "a.b")] == [True] * 4 + [
        False
    ] * 2


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("4 GB", 4 * 10**9), ("16k", 16384), ("1.5g", 3 << 29), ("7", 7), (7, 7)]
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert parse_size(text) == size


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(Sources(sets=["pools.0.workers=3", "fake.vocab_size=9"]))
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(Sources(file=file)) == config
