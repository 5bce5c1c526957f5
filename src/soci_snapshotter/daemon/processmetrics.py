"""What every Prometheus client says of its process (proc(5)), by the names that all of them use."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from soci_snapshotter.formats.promtext import Family

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_families() -> Iterator[Family]:
    """process_cpu_seconds_total and its like."""
    with open("/proc/self/stat", "rb") as file:
        # The command's name, in parentheses, may contain anything.
        fields = file.read().rpartition(b") ")[2].split()
    with open("/proc/stat", "rb") as file:
        boot = next((int(line.split()[1]) for line in file if line.startswith(b"btime ")), 0)
    user, system, start, virtual, resident = (int(fields[number]) for number in (11, 12, 19, 20, 21))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    cpu = Family("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.")
    cpu.add((user + system) / _TICKS)
    yield cpu
    gauges = {
        "process_open_fds": ("Number of open file descriptors.", len(os.listdir("/proc/self/fd")) - 1),
        "process_max_fds": ("Maximum number of open file descriptors.", soft),
        "process_virtual_memory_bytes": ("Virtual memory size in bytes.", virtual),
        "process_resident_memory_bytes": ("Resident memory size in bytes.", resident * _PAGE),
        "process_start_time_seconds": (
            "Start time of the process since unix epoch in seconds.",
            boot + start / _TICKS,
        ),
    }
    for name, (text, value) in gauges.items():
        family = Family(name, "gauge", text)
        family.add(value)
        yield family
