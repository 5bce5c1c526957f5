"""config.toml: the Go daemon's keys and defaults, read into typed structs.

A bad value of a known key refuses to start; an unknown key is a warning that names it; a key this design has no use
for is accepted (COMPATIBILITY.md lists those). 0 means the default for most numbers, as in the Go daemon.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from soci_snapshotter.errors import Config as ConfigError
from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import hosts
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.policy.eager import ALGORITHMS, parse_size

DEFAULT_PATH = Path("/etc/soci-snapshotter-grpc/config.toml")
_FILE_LIMIT = 1 << 20  # a hand-written file; anything larger is not one


class Http(msgspec.Struct, frozen=True):
    """[http]: the budget of one request to a registry, milliseconds."""

    DialTimeoutMsec: int = 3000
    ResponseHeaderTimeoutMsec: int = 3000
    RequestTimeoutMsec: int = 300_000
    MaxRetries: int = 8
    MinWaitMsec: int = 30
    MaxWaitMsec: int = 300_000


class Blob(msgspec.Struct, frozen=True):
    """[blob]: fetching of spans. Retry keys inherit [http] when unset."""

    valid_interval: int = 60
    fetching_timeout_sec: int = 300
    max_retries: int = 0
    min_wait_msec: int = 0
    max_wait_msec: int = 0
    check_always: bool = False
    force_single_range_mode: bool = False
    max_span_verification_retries: int = 0


class DirectoryCache(msgspec.Struct, frozen=True):
    """[directory_cache]: of no use here, the page cache and data.tar serve."""

    max_lru_cache_entry: int = 0
    max_cache_fds: int = 0
    sync_add: bool = False
    direct: bool = True


class Fuse(msgspec.Struct, frozen=True):
    """[fuse]: names and attributes never leave the kernel here, so the timeouts have nothing to time."""

    attr_timeout: int = 1
    entry_timeout: int = 1
    negative_timeout: int = 1
    log_fuse_operations: bool = False


class BackgroundFetch(msgspec.Struct, frozen=True):
    """[background_fetch]."""

    disable: bool = False
    silence_period_msec: int = 30_000
    fetch_period_msec: int = 500
    max_queue_size: int = 300
    drop_policy: Literal["newest", "oldest"] = "newest"
    emit_metric_period_sec: int = 10


class ContentStoreConfig(msgspec.Struct, frozen=True):
    """[content_store]."""

    type: Literal["soci", "containerd"] = "soci"
    containerd_address: str = "/run/containerd/containerd.sock"


class Prefetch(msgspec.Struct, frozen=True):
    """[prefetch]."""

    enable: bool = False
    max_concurrency: int = 0


class Enable(msgspec.Struct, frozen=True):
    """A pull mode's switch."""

    enable: bool = False


class SociV1(msgspec.Struct, frozen=True):
    """[pull_modes.soci_v1]."""

    enable: bool = False
    index_tag: bool = False
    """Ours: where the registry lists no referrer, look for the index under the tag `sha256-<manifest's hex>.soci`."""


class DecompressStream(msgspec.Struct, frozen=True):
    """[pull_modes.parallel_pull_unpack.decompress_streams.<alg>]."""

    path: str = ""
    args: list[str] = []


class ParallelPullUnpack(msgspec.Struct, frozen=True):
    """[pull_modes.parallel_pull_unpack]."""

    enable: bool = False
    experimental_parallel_pull_as_fallback: bool = False
    max_concurrent_downloads: int = -1
    max_concurrent_downloads_per_image: int = 3
    concurrent_download_chunk_size: str = ""
    max_concurrent_unpacks: int = -1
    max_concurrent_unpacks_per_image: int = 1
    discard_unpacked_layers: bool = False
    decompress_streams: dict[str, DecompressStream] = {}


class PullModes(msgspec.Struct, frozen=True):
    """[pull_modes]."""

    soci_v1: SociV1 = SociV1()
    soci_v2: Enable = Enable(True)
    parallel_pull_unpack: ParallelPullUnpack = ParallelPullUnpack()


class KubeconfigKeychain(msgspec.Struct, frozen=True):
    """[kubeconfig_keychain]."""

    enable_keychain: bool = False
    kubeconfig_path: str = ""


class CriKeychain(msgspec.Struct, frozen=True):
    """[cri_keychain]."""

    enable_keychain: bool = False
    image_service_path: str = "/run/containerd/containerd.sock"


class Mirror(msgspec.Struct, frozen=True):
    """One of [[resolver.host.<host>.mirrors]]: `insecure` is http, a negative request_timeout_sec none at all."""

    host: str = ""
    insecure: bool = False
    request_timeout_sec: int = 0


class Host(msgspec.Struct, frozen=True):
    """[resolver.host.<host>]."""

    mirrors: list[Mirror] = []


class Resolver(msgspec.Struct, frozen=True):
    """[resolver]."""

    auth_client_ttl_sec: int = 3600
    enable_auth_client_sharing: bool = False
    host: dict[str, Host] = {}
    config_path: str = "/etc/containerd/certs.d:/etc/docker/certs.d"
    """Ours, named as containerd's: directories of hosts.toml, the first that knows a registry counts; "" for none."""


class SnapshotterConfig(msgspec.Struct, frozen=True):
    """[snapshotter]."""

    min_layer_size: int = 0
    allow_invalid_mounts_on_restart: bool = False
    max_cache_bytes: int = 0
    """Ours: what layers may take on disk before those that no container has are emptied; 0 for no limit."""


class Config(msgspec.Struct, frozen=True):
    """The whole file."""

    http_cache_type: str = ""
    filesystem_cache_type: str = ""
    resolve_result_entry: int = 0
    debug: bool = False
    disable_verification: bool = False
    """Tar headers are not compared with the table of contents. Digests of spans and layers always are."""
    max_concurrency: int = 100
    no_prometheus: bool = False
    mount_timeout_sec: int = 30
    fuse_metrics_emit_wait_duration_sec: int = 60
    metrics_address: str = ""
    metrics_network: Literal["tcp", "unix"] = "tcp"
    debug_address: str = ""
    metadata_store: Literal["db", "db-multi"] = "db"
    metadata_db_no_sync: bool = False
    metadata_insertion_chunk_size: int = 0
    skip_check_snapshotter_supported: bool = False
    mount_method: Literal["auto", "file", "loop", "classic"] = "auto"
    """Ours: how layers are mounted (serve.layer_mounts); "auto" takes the first that works on this node."""
    http: Http = Http()
    blob: Blob = Blob()
    directory_cache: DirectoryCache = DirectoryCache()
    fuse: Fuse = Fuse()
    background_fetch: BackgroundFetch = BackgroundFetch()
    content_store: ContentStoreConfig = ContentStoreConfig()
    prefetch: Prefetch = Prefetch()
    pull_modes: PullModes = PullModes()
    kubeconfig_keychain: KubeconfigKeychain = KubeconfigKeychain()
    cri_keychain: CriKeychain = CriKeychain()
    resolver: Resolver = Resolver()
    snapshotter: SnapshotterConfig = SnapshotterConfig()


def load(path: Path) -> tuple[Config, list[str]]:
    """Read `path`; a missing file gives the defaults only at DEFAULT_PATH.

    Returns the configuration and warnings, one line each. Raises Config naming the file and the key.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
    except FileNotFoundError:
        if path == DEFAULT_PATH:
            return Config(), []
        raise ConfigError(f"{path}: no such file; name an existing one with --config") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > _FILE_LIMIT:
        raise ConfigError(f"{path}: larger than {_FILE_LIMIT} bytes; this is not a config.toml")
    return parse(raw, str(path))


def parse(raw: bytes, name: str) -> tuple[Config, list[str]]:
    """Parse the bytes of a config.toml called `name` (for messages)."""
    try:
        tree = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    try:
        config = msgspec.convert(tree, type=Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_spoken(str(error))}") from None
    _check(config, name)
    return config, [f"{name}: unknown key {key}" for key in _unknown(tree, Config)]


def dump(config: Config) -> bytes:
    """The configuration as TOML, every key written."""
    return msgspec.toml.encode(config)


def _check(config: Config, name: str) -> None:
    """What a type cannot say: durations and counts are not negative, but for those where that means no limit."""
    for section_name in ("http", "blob", "background_fetch", "snapshotter"):
        section = getattr(config, section_name)
        for field in section.__struct_fields__:
            value = getattr(section, field)
            if isinstance(value, int) and value < 0 and field != "max_queue_size":
                raise ConfigError(f"{name}: {section_name}.{field} = {value}: must not be negative")
    if config.mount_timeout_sec < 0:
        raise ConfigError(f"{name}: mount_timeout_sec = {config.mount_timeout_sec}: must not be negative")
    _check_parallel(config, name)
    _check_resolver(config, name)


def _check_resolver(config: Config, name: str) -> None:
    for host, said in config.resolver.host.items():
        for number, mirror in enumerate(said.mirrors):
            key = f"resolver.host.{host!r}.mirrors[{number}].host"
            try:
                hosts.mirror(
                    mirror.host, Endpoint("https", host), insecure=mirror.insecure, request_timeout=None
                )
            except ConfigError as error:
                raise ConfigError(f"{name}: {key}: {error}") from None
    for directory in config.resolver.config_path.split(":"):
        if directory and not os.path.isabs(directory):
            raise ConfigError(f"{name}: resolver.config_path = {directory!r}: must be absolute paths")


def _check_parallel(config: Config, name: str) -> None:
    section, parallel = "pull_modes.parallel_pull_unpack", config.pull_modes.parallel_pull_unpack
    try:
        parse_size(parallel.concurrent_download_chunk_size)
    except Invalid as error:
        raise ConfigError(f"{name}: {section}.concurrent_download_chunk_size: {error}") from None
    on = {
        "enable": parallel.enable,
        "experimental_parallel_pull_as_fallback": parallel.experimental_parallel_pull_as_fallback,
    }
    kept = config.content_store.type == "containerd" or parallel.discard_unpacked_layers
    for key, value in on.items():
        if value and not kept:
            raise ConfigError(
                f'{name}: {section}.{key}: needs content_store.type = "containerd", or {section}.'
                "discard_unpacked_layers = true"
            )
    for algorithm, stream in parallel.decompress_streams.items():
        key = f"{section}.decompress_streams.{algorithm}"
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"{name}: {key}: no such algorithm; known are {', '.join(ALGORITHMS)}")
        if not os.path.isabs(stream.path):
            raise ConfigError(f"{name}: {key}.path = {stream.path!r}: must be an absolute path")
        if not (os.path.isfile(stream.path) and os.access(stream.path, os.X_OK)):
            raise ConfigError(f"{name}: {key}.path = {stream.path!r}: is no program that can be run")


def _spoken(text: str) -> str:
    """msgspec names the place as `$.blob.max_retries`: show the key first."""
    message, _, place = text.partition(" - at `$.")
    return f"{place.rstrip('`')}: {message}" if place else text


def _unknown(tree: dict[str, Any], kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Keys of `tree` that `kind` has no field for, as dotted paths."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            yield prefix + key
            continue
        inner = fields[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from _unknown(value, inner, f"{prefix}{key}.")
