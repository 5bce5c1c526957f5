"""Bytes that a new layer need not fetch: another layer's that are proven to be the same, or its own, just pulled whole.

data.tar is linked into the layer's directory, never moved: whoever has it keeps it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from soci_snapshotter.layers.eager import Filled
from soci_snapshotter.layers.openlayer import Layer
from soci_snapshotter.store.layerfiles import LayerRecord, Stamp, stamp_of

_log = logging.getLogger(__name__)


class Donor(msgspec.Struct, frozen=True):
    """What is known of a data.tar that is whole; the fields are LayerRecord's."""

    diff_id: str
    tar_size: int
    stamp: Stamp
    spans: int
    compressed_size: int
    boot: str
    made: bool = False
    by_span: bool = True

    def give(self, record: LayerRecord) -> LayerRecord:
        """The record of a layer that has these bytes."""
        return msgspec.structs.replace(record, **msgspec.structs.asdict(self))


def borrow(layers: Iterable[Layer], directory: Path) -> Donor | None:
    """Link the data.tar of one of `layers`, all complete, into `directory`; None when none can be.

    The bytes are proven; the tree stays the new ztoc's own, whose every header is to be compared.
    """
    for layer in layers:
        record = layer.record
        try:
            stamp = _link(layer.data, directory)
        except OSError as error:  # it went meanwhile, or has too many links
            _log.debug("cannot share", extra={"layer": str(layer.key), "error": str(error)})
            continue
        if stamp == record.stamp:
            return Donor(
                record.diff_id, record.tar_size, stamp, record.spans, record.compressed_size, record.boot
            )
        (directory / "data.tar").unlink()
    return None


def adopt(filled: Filled, directory: Path, boot: str) -> Donor:
    """Link what was pulled whole into `directory`. Raises OSError.

    A layer that can be fetched by spans may lose its bytes with the power: until they are on the disk they are
    believed in this boot only. Any other is written to the disk now.
    """
    unpacked = filled.unpacked
    stamp = _link(filled.directory / "data.tar", directory)
    if not unpacked.by_span:
        fd = os.open(directory / "data.tar", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        boot = ""
    return Donor(
        diff_id=unpacked.diff_id,
        tar_size=unpacked.tar_size,
        stamp=stamp,
        spans=unpacked.spans,
        compressed_size=filled.layer.size,
        boot=boot,
        made=True,
        by_span=unpacked.by_span,
    )


def _link(source: Path, directory: Path) -> Stamp:
    target = directory / "data.tar"
    target.unlink(missing_ok=True)
    os.link(source, target)
    return stamp_of(target.lstat())
