"""Reading files of layers that are not unpacked, and all of `--prefetch-auto` over real layers."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.ztoc_support import Case, cases

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats import ztoc as ztocs
from soci_snapshotter.formats.oci import RunConfig
from soci_snapshotter.formats.prefetch import decode, encode
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import build_ztoc
from soci_snapshotter.index.closure import closure
from soci_snapshotter.index.getfile import ReadLayer
from soci_snapshotter.index.imagereader import ImageReader, LayerReader
from soci_snapshotter.policy.mergedtree import Found, MergedTree
from soci_snapshotter.policy.prefetchset import LayerContents, Wanted, merged, plan


def reading(layer: bytes, log: list[tuple[int, int]] | None = None) -> ReadLayer:
    def read(offset: int, size: int) -> Iterator[bytes]:
        if log is not None:
            log.append((offset, size))
        yield layer[offset : offset + size]

    return read


@pytest.mark.parametrize(
    "case", [case for case in cases() if "empty" not in case.name], ids=lambda case: case.name
)
def test_any_bytes_of_any_file_are_the_tars(case: Case) -> None:
    """Heads, tails, whole files and what lies beyond, of each vector: what the tar has there."""
    ztoc = ztocs.decode(case.ztoc)
    read = ImageReader([LayerReader(span_table(ztoc), case.ztoc, reading(case.layer))])
    tar = case.tar
    for found in list(MergedTree([ztoc.entries]).walk())[:40]:
        if found.entry is None or not found.is_regular:
            continue
        at, size = found.entry.offset, found.entry.size
        assert read(found, 0, 64) == tar[at : at + min(64, size)]
        assert read(found, max(size - 9, 0), 1000) == tar[at + max(size - 9, 0) : at + size]
        assert read(found, 0, size) == tar[at : at + size]
        assert read(found, size, 5) == read(found, size + 7, 5) == read(found, 0, 0) == b""


def test_a_span_is_read_once_for_many_questions() -> None:
    """Neighboring reads cost one range of the layer."""
    case = next(case for case in cases() if case.name == "gnu6-edge1-span64k")
    ztoc = ztocs.decode(case.ztoc)
    log: list[tuple[int, int]] = []
    reader = LayerReader(span_table(ztoc), case.ztoc, reading(case.layer, log))
    assert b"".join(reader.read(at, 100) for at in range(0, 5000, 100)) == case.tar[:5000]
    assert len(log) == 1


def test_damaged_and_missing_layers_are_told() -> None:
    """A changed or missing byte is Integrity that names the span; a layer without a ztoc is NotFound."""
    case = next(case for case in cases() if case.name == "gnu6-edge1")
    ztoc = ztocs.decode(case.ztoc)
    changed = bytearray(case.layer)
    changed[len(changed) // 2] ^= 1
    for layer in (bytes(changed), case.layer[:5000]):
        reader = LayerReader(span_table(ztoc), case.ztoc, reading(layer))
        with pytest.raises(Integrity, match="span"):
            reader.read(0, ztoc.uncompressed_size)
    with pytest.raises(NotFound, match="no ztoc"):
        ImageReader([None])(Found(b"x", 0, ztoc.entries[0]), 0, 1)


def tar_of(files: dict[str, bytes | str]) -> bytes:
    """A gzip layer; text is a link's target."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, what in files.items():
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if isinstance(what, str):
                info.type, info.linkname = tarfile.SYMTYPE, what
                tar.addfile(info)
            else:
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
    return gzip.compress(out.getvalue(), 6)


def test_prefetch_auto_from_layers_to_artifacts() -> None:
    """A script in a small layer over a real shell and its libraries: what is found in the layers is what the
    machine has, and the artifact's spans hold those files and not the ballast.
    """
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = {os.path.basename(path): path for path in maps if path.startswith("/")}
    loader = "ld-linux-x86-64.so.2"
    if "libc.so.6" not in mapped or loader not in mapped:
        pytest.skip("needs glibc on x86-64")
    host: dict[str, bytes | str] = {
        "bin": "usr/bin",
        "usr/bin/sh": Path("/bin/sh").resolve().read_bytes(),
        "usr/lib/ballast": os.urandom(600_000),
        "lib64": "usr/lib64",
        f"usr/lib64/{loader}": Path(mapped[loader]).read_bytes(),
        "usr/lib64/libc.so.6": Path(mapped["libc.so.6"]).read_bytes(),
    }
    blobs = [tar_of(host), tar_of({"entry.sh": b"#!/bin/sh\nexec true\n", "tmp/noise": os.urandom(9000)})]
    built = [
        build_ztoc([blob], compression=Compression.GZIP, span_size=65536, build_tool="tests")
        for blob in blobs
    ]
    tables = [span_table(ztocs.decode_spans(item.data)) for item in built]
    layers = [LayerContents(built[0].layer_digest, built[0].entries, tables[0])]
    layers.append(
        LayerContents(built[1].layer_digest, built[1].entries, None)
    )  # too small to publish its ztoc
    tree = merged(layers)
    read = ImageReader(
        [
            LayerReader(table, item.data, reading(blob))
            for table, item, blob in zip(tables, built, blobs, strict=True)
        ]
    )
    found = closure(tree, RunConfig(entrypoint=("/entry.sh",)), read)
    assert found.warnings == ()
    assert found.paths[:2] == (b"/entry.sh", b"/usr/bin/sh")
    assert set(found.paths[2:]) == {b"/usr/lib64/ld-linux-x86-64.so.2", b"/usr/lib64/libc.so.6"}
    result = plan(layers, [Wanted(path) for path in found.paths], tree)
    assert [warning.split(":")[0] for warning in result.warnings] == ["/entry.sh"]
    spans = decode(encode(result.spans[built[0].layer_digest]))
    listed = {span for start, end, _ in spans for span in range(start, end + 1)}
    ballast = tree.lookup(b"usr/lib/ballast")
    assert ballast is not None and ballast.entry is not None
    inside = set(tables[0].spans_for(ballast.entry.offset + 65536, ballast.entry.size - 2 * 65536))
    assert len(inside) >= 5 and not listed & inside
    for path in found.paths[1:]:
        file = tree.lookup(path)
        assert file is not None and file.entry is not None
        assert set(tables[0].spans_for(file.entry.offset, file.entry.size)) <= listed
