"""Peak memory of a process and its children, from /proc (Linux).

Sum of VmHWM, with file-backed pages (libraries, mapped weights) counted once.
"""

from __future__ import annotations

from pathlib import Path

_KIB_PER_MIB = 1024


def peak_rss_mib(pid: int, proc: Path = Path("/proc")) -> float:
    """MiB so far; 0 for a process that has ended."""
    found = [_status(proc / str(one) / "status") for one in _tree(pid, proc)]
    files = [file_kib for _, file_kib in found]
    return (sum(peak for peak, _ in found) - sum(files) + max(files, default=0)) / _KIB_PER_MIB


def _tree(pid: int, proc: Path) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        one = left.pop()
        found.append(one)
        left += children.get(one, [])
    return found


def _status(path: Path) -> tuple[int, int]:
    """(VmHWM, RssFile) in KiB."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0, 0  # it ended while we looked
    values = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    return int(values.get("VmHWM", "0")), int(values.get("RssFile", "0"))
