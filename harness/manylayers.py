"""A daemon's root that knows many small lazy layers, written as the daemon writes it, without a registry."""

from __future__ import annotations

import os
from pathlib import Path

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.layers import meta
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.policy.lazy import LazyLayer
from soci_snapshotter.serve.flatfiles import FIRST_NODE
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import LayerRecord, layer_directory, write_record
from soci_snapshotter.store.snapshots import SnapshotStore


def fill_root(root: Path, count: int, ztoc: bytes) -> None:
    """`count` layers that all have this ztoc (nothing is fetched, so that it need not be theirs), a snapshot each."""
    table = ContentStore(root / "content").put(ztoc)
    (root / "snapshotter").mkdir()
    with SnapshotStore(os.fsencode(root / "snapshotter" / "metadata.sqlite")) as rows:
        for number in range(1, count + 1):
            key = LayerKey(digests.sha256(b"layer %d" % number), table)
            directory = layer_directory(root, key.layer, key.ztoc)
            directory.mkdir(parents=True)
            request = meta.MetaRequest(
                ztoc_path=str(ContentStore(root / "content").path(table)),
                ztoc_digest=str(table),
                layer_digest=str(key.layer),
                directory=str(directory),
                layer_size=None,
                lowers=(),
            )
            built = meta.build(request)
            record = LayerRecord(
                layer_digest=str(key.layer),
                ztoc_digest=str(table),
                node_id=FIRST_NODE + number,
                data_size=built.data_size,
                sources=("registry.invalid/nothing:1",),
                mounts={built.meta_hash: number},
            )
            write_record(directory, record)
            target = digests.sha256(b"chain %d" % number)
            labels = {policy.TARGET: str(target), policy.IMAGE_REF: record.sources[0]}
            row = rows.reserve()
            layer = LazyLayer(str(key), number, 4096, 3)
            rows.commit_lazy(row, policy.lazy_key(row, target), parent="", labels=labels, layer=layer)
