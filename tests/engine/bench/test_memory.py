"""Peak memory is summed over a process tree, shared pages once."""

from __future__ import annotations

import os
from pathlib import Path

from engine.bench.memory import peak_rss_mib


def process(proc: Path, pid: int, parent: int, peak_mib: int, file_mib: int) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} (a name) with) S {parent} 1 1 0")
    (folder / "status").write_text(
        f"Name:\tx\nGroups:\t\nVmHWM:\t{peak_mib * 1024} kB\nRssFile:\t{file_mib * 1024} kB\n"
    )


def test_children_count_and_file_pages_count_once(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, peak_mib=500, file_mib=100)
    process(tmp_path, 11, 10, peak_mib=300, file_mib=120)
    process(tmp_path, 12, 11, peak_mib=200, file_mib=80)
    process(tmp_path, 13, 1, peak_mib=9000, file_mib=0)
    assert peak_rss_mib(10, tmp_path) == (400 + 180 + 120) + 120


def test_a_process_that_has_ended_has_no_memory(tmp_path: Path) -> None:
    assert peak_rss_mib(10, tmp_path) == 0


def test_memory_that_was_freed_still_counts() -> None:
    data = b"x" * (256 << 20)
    assert len(data) > 0
    del data
    assert peak_rss_mib(os.getpid()) >= 256
