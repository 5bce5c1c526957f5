"""What the C library keeps of freed memory."""

import subprocess
import sys
from pathlib import Path

_WORK = """
import threading
from soci_snapshotter.linux.malloc import give_memory_back
{setting}
kept = []
def spans():
    for size in (4 << 20, 6 << 20, 8 << 20):
        parts = [bytes([1]) * (size // 16) for _ in range(16)]
        kept.append(b"".join(parts)[:1000])
        small = [bytes(2000) for _ in range(500)]
        kept.append(small[::50])
for _ in range(4):
    threads = [threading.Thread(target=spans) for _ in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def _resident_kib(setting: str) -> int:
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", _WORK.format(setting=setting)],
        env={"PYTHONPATH": str(source)},
        capture_output=True,
        check=True,
        text=True,
    )
    return int(done.stdout)


def test_what_spans_took_goes_back() -> None:
    """After 16 threads held spans of some MiB, a process that asked for it keeps little more than what it still uses."""
    assert _resident_kib("assert give_memory_back()") < 45_000
