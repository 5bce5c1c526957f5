"""Who is told the truth about a layer: its claims judged, lies condemned, changed files found out (HOUSE.md, "Proof").

Every function runs in the layer's turn, unless it says otherwise.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from soci_snapshotter.errors import SociError
from soci_snapshotter.layers.complete import hash_tar
from soci_snapshotter.layers.openlayer import Layer, LayerKey
from soci_snapshotter.policy.proof import Claim, judge
from soci_snapshotter.store.condemned import Condemned, Entry
from soci_snapshotter.store.layerfiles import LayerRecord, stamp_of

_log = logging.getLogger(__name__)


LOST = "its data.tar was changed by somebody else, or lost by the disk"


class Book(Protocol):
    """Who knows the snapshots (snapshotter.Snapshotter)."""

    def handed_out(self) -> frozenset[bytes]:
        """Every path that an active or view snapshot was given."""

    def claims(self, mount_ids: Sequence[int]) -> list[Claim]:
        """What the snapshots on these rows' numbers say of their layers; condemned ones are left out."""

    def condemn(self, reasons: dict[int, str]) -> None:
        """These snapshots (row id -> why) are not to be used any more."""


class Prover:
    """Judges. `counts` has layers_condemned and snapshots_condemned."""

    def __init__(self, condemned: Condemned, counts: Counter[str]) -> None:
        self._condemned = condemned
        self._counts = counts
        self.book: Book | None = None

    def refusal(self, key: LayerKey, record: LayerRecord | None, claim: Claim) -> str | None:
        """Why the layer must not serve a snapshot with this claim, None when nothing is known against it."""
        if record is not None and record.lie:
            return record.lie
        if record is not None and record.complete:
            return None if claim.fits(record.diff_id) else _misfit(key, record.diff_id, claim)
        known = self._condemned.find(str(key.layer), str(key.ztoc))
        if known is None:
            return None
        if not known.diff_id:
            return known.reason
        return None if claim.fits(known.diff_id) else _misfit(key, known.diff_id, claim)

    def judge(self, layer: Layer) -> None:
        """Hold a complete layer against what its snapshots say, and condemn what does not fit."""
        record = layer.record
        if record.lie:
            return  # whatever its bytes are
        claims = [] if self.book is None else self.book.claims(tuple(record.mounts.values()))
        if not claims:
            return
        found = judge(record.diff_id, claims)
        self._condemn(layer, {claim: _misfit(layer.key, record.diff_id, claim) for claim in found.condemned})
        if record.condemned != (not found.proven):
            layer.save(msgspec.structs.replace(record, condemned=not found.proven))
            if layer.whole is not None:
                layer.whole.condemned = layer.record.condemned
        if not found.proven:
            reason = _misfit(layer.key, record.diff_id, claims[0])
            self._remember(layer, Entry(record.layer_digest, record.ztoc_digest, record.diff_id, reason))

    def lie(self, layer: Layer, reason: str) -> None:
        """The ztoc does not say what is in the layer: none of its snapshots is to be used, whatever the DiffID."""
        record = layer.record
        layer.save(msgspec.structs.replace(record, condemned=True, lie=reason))
        claims = [] if self.book is None else self.book.claims(tuple(record.mounts.values()))
        self._condemn(layer, dict.fromkeys(claims, reason))
        self._remember(layer, Entry(record.layer_digest, record.ztoc_digest, "", reason))

    def settle(self, layer: Layer, turn: Callable[[], AbstractContextManager[None]]) -> None:
        """Write the layer's bytes to the disk: from then on a power loss does not take them. Outside the layer's turn.

        Raises OSError; then they are not believed any more.
        """
        try:
            layer.flush()
        except FileNotFoundError:  # dropped
            return
        except OSError:
            with turn():
                self.lost(layer)
            raise
        with turn():
            if layer.record.boot and layer.intact():
                layer.save(msgspec.structs.replace(layer.record, boot=""))

    def lost(self, layer: Layer) -> None:
        """The bytes of a layer are gone, and cannot be fetched by spans: its snapshots are not to be used any more."""
        layer.save(msgspec.structs.replace(layer.record, condemned=True, lie=LOST))
        claims = [] if self.book is None else self.book.claims(tuple(layer.record.mounts.values()))
        self._condemn(layer, dict.fromkeys(claims, f"layer {layer.record.layer_digest}: {LOST}"))

    def _condemn(self, layer: Layer, reasons: dict[Claim, str]) -> None:
        if self.book is None or not reasons:
            return
        self.book.condemn({claim.snapshot: reason for claim, reason in reasons.items()})
        for claim, reason in reasons.items():
            self._counts["snapshots_condemned"] += 1
            _log.error(
                "snapshot condemned: remove the image and pull it again",
                extra={
                    "image": claim.image,
                    "reason": reason,
                    "layer": layer.record.layer_digest,
                    "ztoc": layer.record.ztoc_digest,
                    "target": claim.target,
                },
            )

    def _remember(self, layer: Layer, entry: Entry) -> None:
        known = self._condemned.find(entry.layer, entry.ztoc)
        if known is not None and known.diff_id == entry.diff_id:
            return
        self._counts["layers_condemned"] += 1
        _log.error("layer condemned: reads fail", extra={"layer": str(layer.key), "reason": entry.reason})
        try:
            self._condemned.add(entry)
        except OSError as error:
            _log.warning("cannot remember a condemned layer", extra={"error": str(error)})


def believed(layer: Layer, boot: str) -> bool:
    """Whether a complete layer's data.tar is what was hashed: untouched, or of the same DiffID still.

    `boot`: this boot's id. What an earlier one did not live to write to the disk is hashed, whatever it looks like.
    """
    record = layer.record
    settled = record.boot in ("", boot)
    if settled and layer.intact():
        return True
    same = False
    try:
        fd = os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_size >= record.data_size:
                same = hash_tar(fd, record.tar_size) == record.diff_id
        finally:
            os.close(fd)
    except (SociError, OSError) as error:
        _log.debug("data.tar cannot be hashed", extra={"layer": str(layer.key), "error": str(error)})
    if same:
        layer.save(
            msgspec.structs.replace(record, stamp=stamp_of(status), boot=record.boot if settled else "")
        )
        _log.warning("data.tar was touched, not changed", extra={"layer": str(layer.key)})
    else:
        again = "it is fetched again" if record.by_span else "its images must be removed and pulled again"
        _log.error(
            f"data.tar of a complete layer was changed by somebody else: {again}, and containers that "
            "use it must be restarted",
            extra={"layer": str(layer.key)},
        )
    return same


def _misfit(key: LayerKey, diff_id: str, claim: Claim) -> str:
    return (
        f"layer {key.layer} with ztoc {key.ztoc} has the DiffID {diff_id}, which does not make {claim.target} of image "
        f"{claim.image or '(no name)'}"
    )
