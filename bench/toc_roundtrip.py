"""toc-roundtrip: CPU to write a table of contents into a ztoc and to read it back, 100,000 entries."""

import time
from collections.abc import Iterator

from bench.meta_build import layer_entries
from bench.result import Result, smaller_is_better
from soci_snapshotter.formats import zinfo, ztoc, ztoc_writer
from soci_snapshotter.formats.ztoc import Compression, Ztoc

NAMES = ("toc-roundtrip",)

TARGET_S = 1.5

_ENTRIES = 100_000

_RECORDS = ((b"SCHILY.xattr.security.capability", b"\1\0\0\2\0\40\0\0" + bytes(12)),)
"""Of every hundredth entry."""


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """CPU seconds in one thread, every entry checked; the peer is what the project allows itself."""
    entries, size = layer_entries(_ENTRIES // 100 if smoke else _ENTRIES)
    entries[::100] = [entry._replace(records=_RECORDS) for entry in entries[::100]]
    table = Ztoc(
        version=ztoc.VERSION,
        build_tool="bench",
        compressed_size=size,
        uncompressed_size=size,
        compression=Compression.GZIP,
        max_span_id=0,
        span_digests=["sha256:" + "0" * 64],
        checkpoints=zinfo.HEAD.pack(1, 4 << 20),
        checkpoints_offset=0,
        entries=entries,
    )
    runs, write = [], 0.0
    data = b""
    for _ in range(1 if smoke else 7):
        started = time.process_time()
        data = ztoc_writer.encode(table)
        write = time.process_time() - started
        back = ztoc.decode(data)
        runs.append({"ours": time.process_time() - started, "peer": TARGET_S})
        if back.entries != entries:
            raise RuntimeError("what was read is not what was written")
    yield smaller_is_better(
        names[0],
        f"{len(entries):,} entries written and read back; peer is no program but the limit of {TARGET_S} s",
        "CPU s",
        runs,
        target=1.0,
        notes={"write_s": round(write, 3), "bytes_per_entry": round(len(data) / len(entries), 1)},
    )
