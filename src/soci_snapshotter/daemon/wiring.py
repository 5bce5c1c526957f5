"""Builds the daemon from its parts, lowest first, and takes it down in the opposite order."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from soci_snapshotter.daemon.config import Config
from soci_snapshotter.daemon.criproxy import MAX_MESSAGE
from soci_snapshotter.daemon.fetching import background_rules, eager_rules, flight_limit
from soci_snapshotter.daemon.introspection import Parts, introspection
from soci_snapshotter.daemon.keychains import Keychains, keychains
from soci_snapshotter.daemon.registries import registry_hosts, registry_options
from soci_snapshotter.daemon.snapshots_service import SnapshotsService
from soci_snapshotter.daemon.survival import Survival
from soci_snapshotter.errors import Config as ConfigError
from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.index.create import BUILD_TOOL, DEFAULT_SPAN_SIZE
from soci_snapshotter.layers.ahead import ZtocsAhead
from soci_snapshotter.layers.background import Background
from soci_snapshotter.layers.complete import Completer
from soci_snapshotter.layers.eager import EagerPulls, Tools
from soci_snapshotter.layers.flights import RangeSource
from soci_snapshotter.layers.freeindex import FreeIndexes
from soci_snapshotter.layers.images import Images
from soci_snapshotter.layers.keeping import ContainerdKeeper
from soci_snapshotter.layers.lazy import Lazy, Syncer
from soci_snapshotter.layers.openlayer import Surroundings
from soci_snapshotter.layers.openlayers import OpenLayers
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.prefetching import Prefetcher
from soci_snapshotter.layers.reader import ReadOptions
from soci_snapshotter.layers.resolve import DEFAULT_CACHE, IndexResolver
from soci_snapshotter.layers.unpackers import Unpackers
from soci_snapshotter.layers.whole import WholeLayers
from soci_snapshotter.layers.workers import MetaWorkers
from soci_snapshotter.policy.counters import Counters
from soci_snapshotter.policy.eager import Eager
from soci_snapshotter.policy.prepare import Options as PrepareOptions
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.ranges import BlobReader
from soci_snapshotter.serve.flatfiles import FuseServer
from soci_snapshotter.serve.layer_mounts import LayerMounts
from soci_snapshotter.serve.probe import probe
from soci_snapshotter.snapshotter.directories import overlay_options
from soci_snapshotter.snapshotter.migrate import go_root
from soci_snapshotter.snapshotter.snapshotter import Snapshotter
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import LayerRecord, boot_id

_log = logging.getLogger(__name__)

Blob = Callable[[Reference, Digest, int], BlobReader]
"""Reads a layer's blob of that many bytes."""

RPC_THREADS = 32  # calls block while a layer is resolved; an image has 10 to 30 layers
META_WORKERS = 2  # processes that build meta.erofs at once
STOP_SECONDS = 5.0  # what calls under way are given when the daemon stops


@dataclass(frozen=True, slots=True)
class Daemon:
    """What runs."""

    layers: OpenLayers
    snapshotter: Snapshotter
    mounter: LayerMounts
    survival: Survival

    def unmount_all(self) -> None:
        """SIGINT: take every mount down, and the keeper with them."""
        self.snapshotter.unmount_all()
        self.layers.unmount_all()
        self.mounter.detach()
        self.survival.end()


@contextmanager
def running(
    config: Config, *, root: Path, address: Path, docker_config: Path, survival: Survival
) -> Iterator[Daemon]:
    """The daemon serves while the block lasts. Raises Config or Unsupported, one line each, when it cannot."""
    _make_directories(root, root / "snapshotter", address.parent)
    stack_kind = probe(root, None if config.mount_method == "auto" else config.mount_method)
    _log.info("layers are mounted", extra={"method": stack_kind.method, "how": stack_kind.text})
    with go_root(root), ExitStack() as stack:
        connection = survival.acquire(address.parent)
        counters = Counters()
        pool = FlightPool(flight_limit(config), listed=config.prefetch.max_concurrency)
        # A flight that outlives the pool's patience may still answer: then the descriptor closes with the process.
        stack.callback(lambda: survival.let_go() if pool.idle else None)
        fresh = connection.fresh  # entering the server does not change what it was
        content = ContentStore(root / "content")
        logins = stack.enter_context(keychains(config, docker_config))
        client, connections = stack.enter_context(_registries(config, logins))
        workers = stack.enter_context(MetaWorkers(META_WORKERS))
        images = Images(client)
        free = FreeIndexes(root, content, images, span_size=DEFAULT_SPAN_SIZE, build_tool=BUILD_TOOL)
        releases = ThreadPoolExecutor(1, "release")
        ours: list[OpenLayers] = []
        server = FuseServer(
            connection, on_release=lambda node: _released(releases, ours, node), on_abort=survival.on_abort
        )

        blob = partial(_blob, client, connections, counters)
        mounter = LayerMounts(stack_kind, root / "m", server, address.parent / "trees")
        options = _read_options(config)
        layers = stack.enter_context(
            OpenLayers(
                root,
                content=content,
                workers=workers,
                server=server,
                mounter=mounter,
                around=Surroundings(
                    server, pool, options, boot_id(), partial(_source, blob), counters, free.keeps
                ),
                quota=config.snapshotter.max_cache_bytes,
            )
        )
        ours.append(layers)
        stack.callback(releases.shutdown)  # before the layers close: a release may be dropping one
        layers.restore_files(fresh=fresh)
        mounter.load(fresh=fresh)
        stack.enter_context(Syncer(layers))
        stack.enter_context(server)
        stack.enter_context(pool)
        off = config.background_fetch.disable
        background = stack.enter_context(
            Background(layers.layers, pool, background_rules(config), enabled=not off, counters=counters)
        )
        prefetcher = stack.enter_context(Prefetcher(client, enabled=config.prefetch.enable))
        resolver = _resolver(config, client, counters, images)
        rules = eager_rules(config)
        lazy = Lazy(
            layers,
            resolver,
            client,
            content,
            prefetcher,
            min_layer_size=config.snapshotter.min_layer_size,
            counters=counters,
            images=images,
            rules=rules,
            ahead=stack.enter_context(ZtocsAhead(client, content)),
            wholes=WholeLayers(layers, images, stack.enter_context(_pulls(config, root, blob)), free),
        )
        snapshotter = stack.enter_context(_snapshotter(layers, lazy, resolver, rules, root=root, fresh=fresh))
        stack.enter_context(_restored(config, layers, snapshotter, fresh=fresh))
        events = partial(_events, server, prefetcher)
        parts = Parts(
            root, counters, layers, background, background_enabled=not off, pool=pool, events=events
        )
        stack.enter_context(introspection(config, parts, address.parent))
        stack.enter_context(_serving(snapshotter, address, lazy.give_up, logins))
        yield Daemon(layers, snapshotter, mounter, survival)


def _events(server: FuseServer, prefetcher: Prefetcher) -> dict[str, int]:
    """What is counted elsewhere than in `policy.counters`, by its name in the metrics."""
    return {
        **server.failures,
        "prefetch_artifacts": prefetcher.artifacts,
        "prefetch_failures": prefetcher.failures,
    }


@contextmanager
def _restored(config: Config, layers: OpenLayers, snapshotter: Snapshotter, *, fresh: bool) -> Iterator[None]:
    """Layers and snapshots know of each other, what was mounted is adopted, and complete layers are proven."""
    layers.attach(snapshotter)
    quiet = config.snapshotter.allow_invalid_mounts_on_restart
    layers.restore_mounts(snapshotter.lazy_rows(), fresh=fresh, expect_lost=quiet)
    completer = Completer(layers)
    layers.on_full, layers.on_lie = completer.submit, completer.condemn
    with completer:
        cleanup = threading.Thread(target=snapshotter.cleanup, name="cleanup", daemon=True)
        cleanup.start()
        try:
            yield
        finally:
            cleanup.join()


@contextmanager
def _registries(config: Config, logins: Keychains) -> Iterator[tuple[RegistryClient, ConnectionPool]]:
    options = registry_options(config, os.environ)
    with (
        RegistryClient(options, logins.keychain, registry_hosts(config, options)) as client,
        ConnectionPool(options) as connections,
    ):
        logins.logins.dropped = client.session.authenticator.drop
        yield client, connections


def _make_directories(*directories: Path) -> None:
    for directory in directories:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{directory}: {error.strerror}; run as root, or choose --root and --address"
            ) from None


def _source(blob: Blob, record: LayerRecord, size: int) -> RangeSource:
    """Where a layer's bytes come from; `size` is the blob's."""
    if not record.sources:
        raise Integrity(f"layer {record.layer_digest}: no source is known")
    return blob(references.parse(record.sources[0]), digests.parse(record.layer_digest), size)


def _blob(
    client: RegistryClient,
    connections: ConnectionPool,
    counters: Counters,
    reference: Reference,
    layer: Digest,
    size: int,
) -> BlobReader:
    return BlobReader(client, connections, reference, layer, size, counters.layer(str(layer)))


@contextmanager
def _pulls(config: Config, root: Path, blob: Blob) -> Iterator[EagerPulls]:
    """What pulls layers whole."""
    with (
        Unpackers() as unpackers,
        EagerPulls(
            root,
            eager_rules(config),
            Tools(unpackers, DEFAULT_SPAN_SIZE, BUILD_TOOL),
            blob,
            request_seconds=float(config.blob.fetching_timeout_sec or 300),
            keep=ContainerdKeeper(config.content_store.containerd_address),
        ) as pulls,
    ):
        yield pulls


def _snapshotter(
    layers: OpenLayers, lazy: Lazy, resolver: IndexResolver, rules: Eager, *, root: Path, fresh: bool
) -> Snapshotter:
    known = len(layers.all_layers())
    snapshotter = Snapshotter(
        os.fsencode(root / "snapshotter"),
        lazy=lazy,
        options=PrepareOptions(resolver.discovers, rules.primary or rules.fallback),
        overlay_options=overlay_options(),
        missed=f"{known} layers in {root}/layers" if known else "",
    )
    if fresh:
        snapshotter.unmount_all()
    return snapshotter


def _resolver(config: Config, client: RegistryClient, counters: Counters, images: Images) -> IndexResolver:
    modes = config.pull_modes
    return IndexResolver(
        client,
        v1=modes.soci_v1.enable,
        v2=modes.soci_v2.enable,
        tag=modes.soci_v1.index_tag,
        entries=config.resolve_result_entry or DEFAULT_CACHE,
        counters=counters,
        images=images,
    )


@contextmanager
def _serving(
    snapshotter: Snapshotter, address: Path, stopping: Callable[[], None], logins: Keychains
) -> Iterator[None]:
    """gRPC on the unix socket `address`; a socket left by a dead daemon is replaced (the keeper allows one daemon).

    `stopping` ends calls that may take long.
    """
    address.unlink(missing_ok=True)
    with ThreadPoolExecutor(RPC_THREADS, "rpc") as pool, snapshotter.returning():
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", MAX_MESSAGE)])
        add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
        if logins.cri is not None:
            server.add_generic_rpc_handlers((logins.cri,))
        server.add_insecure_port(f"unix:{address}")
        server.start()
        os.chmod(address, 0o600)
        try:
            yield
        finally:
            stopped = server.stop(STOP_SECONDS)  # takes no more calls
            stopping()
            stopped.wait()


def _released(executor: ThreadPoolExecutor, layers: list[OpenLayers], node: int) -> None:
    for table in layers:
        try:
            executor.submit(table.released, node)
        except RuntimeError:  # stopping: the next start finds a layer without mounts and drops it
            _log.debug("release while stopping", extra={"node": node})


def _read_options(config: Config) -> ReadOptions:
    if config.disable_verification:
        _log.warning(
            "disable_verification is set: tar headers are not compared with tables of contents; "
            "digests are checked all the same"
        )
    return ReadOptions(float(config.blob.fetching_timeout_sec or 300), verify=not config.disable_verification)
