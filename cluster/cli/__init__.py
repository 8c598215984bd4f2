"""The `neap` command: serve, chat, status, version. Flags of `serve` are generated from the cluster file's model."""

from cluster.cli.app import main

__all__ = ["main"]
