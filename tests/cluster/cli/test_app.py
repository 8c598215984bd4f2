"""The command line: generated flags reach the configuration, mistakes are named, nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from cluster.cli.flags import flag_parameters
from cluster.config import ClusterConfig


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def test_every_plain_option_has_a_flag_and_its_key() -> None:
    flags = {name: key for name, (key, _) in flag_parameters().items()}
    assert flags["max_model_len"] == "engine.max_model_len"
    assert flags["port"] == "router.port"
    assert flags["backend"] == "backend"
    assert flags["ray_address"] == "ray.address"
    assert "pools" not in flags and "model" not in flags


def test_path_file_flags_and_sets_reach_the_configuration(served: list[ClusterConfig], tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("engine: {max_num_seqs: 3}\n")
    arguments = ["--max-model-len", "32768", "--no-enable-prefix-caching", "--config", str(file), "--port", "0"]
    assert run("serve", "/models/x", *arguments, "--set", "pools.0.workers=2", "--set", "backend=process") == (0, "")
    (config,) = served
    options = config.engine_options(config.pools[1])
    assert (options["max_model_len"], options["max_num_seqs"], options["enable_prefix_caching"]) == (32768, 3, False)
    assert (config.model, config.pools[0].workers, config.backend) == ("/models/x", 2, "process")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--prot", "1"], "No such option: --prot"),
        (["serve", "--port", "high"], "--port: router.port: expected a valid integer"),
        (["serve", "--set", "pools.0.worker=1"], "did you mean workers?"),
        (["serve", "--host", "0.0.0.0"], "give --api-key (or --insecure)"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["swerve"], "No such command 'swerve'"),
        (["status", "--url", "https://x"], "expected http://HOST:PORT"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(served: list[ClusterConfig], arguments: list[str], said: str) -> None:
    code, output = run(*arguments)
    assert (code, served) == (2, [])
    assert said in output


def test_without_a_server_status_and_chat_say_so() -> None:
    for command in ("status", "chat"):
        code, output = run(command, "--url", "http://127.0.0.1:1")
        assert code == 1
        assert "no answer from http://127.0.0.1:1" in output


def test_version_names_the_distribution() -> None:
    code, output = run("version")
    assert code == 0
    assert output.startswith("neap 0.")


def test_the_command_line_loads_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.cli; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
