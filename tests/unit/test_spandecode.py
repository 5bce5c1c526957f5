"""The bytes of runs of spans, as they stream in, into data.tar."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from tests.unit.ztoc_support import Case, cases

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.spandecode import SpanIntake
from soci_snapshotter.store.layerfiles import SpanFile


class Node:
    """One layer's files, and which spans landed."""

    def __init__(self, directory: Path, case: Case) -> None:
        table = ztoc.decode(case.ztoc)
        (directory / "ztoc").write_bytes(case.ztoc)
        self.layer = case.layer
        self.spans: SpanTable = span_table(table)
        self.files = SpanFile(directory, len(self.spans), data_size(table.uncompressed_size), b"a" * 36)
        self.windows = os.open(directory / "ztoc", os.O_RDONLY)
        self.landed: list[int] = []

    def intake(self, first: int, last: int) -> SpanIntake:
        """For a run of spans."""
        return SpanIntake(self.spans, self.files, self.windows, first, last, self.landed.append)

    def close(self) -> None:
        """Close the files."""
        self.files.close()
        os.close(self.windows)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_whole_layer_in_pieces_of_any_size(case: Case, tmp_path: Path) -> None:
    """One run over all spans, in pieces that end anywhere: the tar, each span told once and in order."""
    node, rng = Node(tmp_path, case), random.Random(5)
    intake = node.intake(0, len(node.spans) - 1)
    start, end = intake.byte_range
    blob = memoryview(node.layer)[start:end]
    while len(blob):
        size = rng.choice((1, 100, 70_000, 300_000))
        intake.feed(blob[:size])
        blob = blob[size:]
    intake.finish()
    assert node.landed == list(range(len(node.spans)))
    wanted = os.pread(node.files.fd, node.files.tar_size, 0)
    assert hashlib.sha256(wanted).hexdigest() == case.raw["tar_sha256"]
    again = tmp_path / "again"
    again.mkdir()
    node.close()
    alone = Node(again, case)  # each span by itself gives the same: nothing leaks from one into the next
    for span in range(len(alone.spans)):
        single = alone.intake(span, span)
        start, end = single.byte_range
        single.feed(memoryview(alone.layer)[start:end])
        single.finish()
    assert os.pread(alone.files.fd, len(wanted), 0) == wanted
    alone.close()


def test_what_is_here_is_passed_by(tmp_path: Path) -> None:
    """Spans that another flight brought are neither written nor told; their neighbors are right."""
    (case,) = (c for c in cases() if c.name == "gnu6-edge1-span64k")
    node = Node(tmp_path, case)
    node.files.live[2] = node.files.live[3] = 1
    intake = node.intake(1, 5)
    start, end = intake.byte_range
    intake.feed(memoryview(node.layer)[start:end])
    intake.finish()
    assert node.landed == [1, 4, 5]
    begin, stop = node.spans.uncompressed_range(2)[0], node.spans.uncompressed_range(3)[1]
    assert not any(os.pread(node.files.fd, stop - begin, begin))
    node.close()


def test_a_wrong_byte_is_a_wrong_digest(tmp_path: Path) -> None:
    """Whether or not the bytes still inflate, the error names the span and the digest, and nothing is written."""
    (case,) = (c for c in cases() if c.name == "gnu6-edge1-span64k")
    node, rng = Node(tmp_path, case), random.Random(9)
    start, end = node.spans.compressed_range(4)
    for _ in range(30):
        bad = bytearray(node.layer[start:end])
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        intake = node.intake(4, 4)
        with pytest.raises(Integrity, match="span 4: its bytes have digest"):
            intake.feed(memoryview(bad))
    with pytest.raises(Integrity, match=r"span 4: .* bytes came"):
        node.intake(4, 4).finish()
    assert node.landed == []
    assert not any(os.pread(node.files.fd, 1000, node.spans.uncompressed_range(4)[0]))
    node.close()
