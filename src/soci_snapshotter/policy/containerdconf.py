"""What containerd's configuration must say for lazy layers, judged from the parsed TOML.

The facts are containerd's: a snapshotter of its own process is a proxy plugin (PLUGINS.md); CRI hands image labels to
snapshotters only with disable_snapshot_annotations = false, which is not the default (cri/config.md), and whose
section has another name in 2.x; the transfer service of 2.x, which `ctr` uses, wants an unpack_config for every
snapshotter but its own, and hands labels to proxies that export enable_remote_snapshot_annotations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .findings import Finding, ok, problem, warning

Tree: TypeAlias = Mapping[str, Any]

_CRI_1 = "io.containerd.grpc.v1.cri"
_CRI_2 = "io.containerd.cri.v1.images"
_RUNTIME_2 = "io.containerd.cri.v1.runtime"
_TRANSFER = "io.containerd.transfer.v1.local"
_DEFAULT = "overlayfs"
_ANNOTATIONS = "enable_remote_snapshot_annotations"
RESTART = "systemctl restart containerd"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the configuration should name: our snapshotter, its socket, and the file to write it to.

    `major` is containerd's version, 1 or 2; `running` says that containerd lists the snapshotter already.
    """

    snapshotter: str
    address: str
    file: str
    major: int
    running: bool = False


def merged(trees: Sequence[Tree]) -> dict[str, Any]:
    """A configuration and its imports as containerd joins them: later ones win, a plugin's section as a whole."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                result[key] = {**_table(result.get(key)), **value}
            elif isinstance(value, list):
                before = result.get(key)
                result[key] = [*before, *value] if isinstance(before, list) else value
            else:
                result[key] = value
    return result


def proxy_lines(wanted: Wanted) -> tuple[str, ...]:
    """What makes containerd know the snapshotter."""
    return (
        f"in {wanted.file} (the file begins with: version = {3 if wanted.major >= 2 else 2}):",
        f"  [proxy_plugins.{wanted.snapshotter}]",
        '    type = "snapshot"',
        f'    address = "{wanted.address}"',
        f"    [proxy_plugins.{wanted.snapshotter}.exports]",
        f'      {_ANNOTATIONS} = "true"',
        f"then: {RESTART}",
    )


def check_proxy(tree: Tree, wanted: Wanted) -> Finding:
    """[proxy_plugins.<name>]: there, of type snapshot, with our socket."""
    name = "containerd config"
    section = _table(_table(tree.get("proxy_plugins")).get(wanted.snapshotter))
    where = f"[proxy_plugins.{wanted.snapshotter}]"
    if not section:
        if wanted.running:
            return warning(name, f"{wanted.file} has no {where}; containerd must have another file")
        return problem(name, f"{wanted.file} has no {where}", *proxy_lines(wanted))
    if section.get("type") != "snapshot":
        found = f"{wanted.file}: {where} type is {section.get('type')!r}, not 'snapshot'"
        return problem(name, found, *proxy_lines(wanted))
    address = str(section.get("address", "")).removeprefix("unix://")
    if address != wanted.address:
        found = f"{wanted.file}: {where} address is {address}, the daemon's socket {wanted.address}"
        return problem(name, found, *proxy_lines(wanted), f"or start the daemon with: --address {address}")
    capabilities = section.get("capabilities")
    if isinstance(capabilities, list) and "rebase" in capabilities:
        return warning(
            name,
            f"{wanted.file}: {where} capabilities has rebase: layers unpacked in parallel are not lazy",
            f'in {wanted.file}: take "rebase" out of capabilities in {where}',
            f"then: {RESTART}",
        )
    return ok(name, f"{wanted.file}: {where} address is {address}")


def check_cri(tree: Tree, wanted: Wanted) -> Finding:
    """Whether Kubernetes (CRI) pulls through the snapshotter, and tells it what it pulls."""
    name = "CRI"
    disabled = tree.get("disabled_plugins")
    if isinstance(disabled, list) and {"cri", _CRI_1, _CRI_2} & {str(each) for each in disabled}:
        return ok(name, "off in containerd: Kubernetes does not use it")
    plugins = _table(tree.get("plugins"))
    old = _table(_table(plugins.get(_CRI_1) or plugins.get("cri")).get("containerd"))
    images = {**old, **_table(plugins.get(_CRI_2))}
    runtimes = {
        **_table(old.get("runtimes")),
        **_table(_table(_table(plugins.get(_RUNTIME_2)).get("containerd")).get("runtimes")),
    }
    snapshotter = images.get("snapshotter", _DEFAULT)
    by_runtime = [
        key for key, value in runtimes.items() if _table(value).get("snapshotter") == wanted.snapshotter
    ]
    if snapshotter != wanted.snapshotter and not by_runtime:
        return warning(
            name, f"Kubernetes pulls through {snapshotter}; if that is not meant:", *_cri_lines(wanted)
        )
    told = images.get("disable_snapshot_annotations") is False
    if not told and not (
        wanted.major >= 2 and _transfer_ready(tree, wanted) and not images.get("use_local_image_pull")
    ):
        return problem(
            name,
            "disable_snapshot_annotations is not false: the snapshotter is not told which image a layer is of, "
            "and nothing is lazy",
            *_cri_lines(wanted),
        )
    through = (
        wanted.snapshotter if not by_runtime else f"{wanted.snapshotter} (runtime {', '.join(by_runtime)})"
    )
    return ok(name, f"Kubernetes pulls through {through}, with annotations")


def check_transfer(tree: Tree, wanted: Wanted) -> Finding | None:
    """For 2.x: what `ctr images pull` and the transfer service need; None for 1.x, which has no need of it."""
    if wanted.major < 2:
        return None
    if _transfer_ready(tree, wanted):
        return ok("transfer service", f"unpacks through {wanted.snapshotter}, with annotations")
    lines = [f"in {wanted.file}:"]
    section = _table(_table(tree.get("proxy_plugins")).get(wanted.snapshotter))
    # Without the section itself, `proxy_lines` says it, and TOML has a table but once.
    if section and not _annotated(tree, wanted):
        lines += [f"  [proxy_plugins.{wanted.snapshotter}.exports]", f'    {_ANNOTATIONS} = "true"']
    unpack = _unpack_config(tree)
    # A list of one's own replaces containerd's, which has its default snapshotter alone.
    missing = [wanted.snapshotter] if unpack else [_DEFAULT, wanted.snapshotter]
    for snapshotter in missing:
        if snapshotter not in unpack:
            lines += [f'  [[plugins."{_TRANSFER}".unpack_config]]', '    platform = "linux"']
            lines += [f'    snapshotter = "{snapshotter}"']
    return warning(
        "transfer service",
        f"`ctr images pull --snapshotter {wanted.snapshotter}` is refused or not lazy (`soci pull` is not affected)",
        *lines,
        f"then: {RESTART}",
    )


def _transfer_ready(tree: Tree, wanted: Wanted) -> bool:
    return wanted.snapshotter in _unpack_config(tree) and _annotated(tree, wanted)


def _annotated(tree: Tree, wanted: Wanted) -> bool:
    section = _table(_table(tree.get("proxy_plugins")).get(wanted.snapshotter))
    return _table(section.get("exports")).get(_ANNOTATIONS) == "true"


def _unpack_config(tree: Tree) -> list[str]:
    """The snapshotters that the file's own list names."""
    unpack = _table(_table(tree.get("plugins")).get(_TRANSFER)).get("unpack_config")
    return [str(_table(entry).get("snapshotter")) for entry in unpack] if isinstance(unpack, list) else []


def _cri_lines(wanted: Wanted) -> tuple[str, ...]:
    section = f'[plugins."{_CRI_2}"]' if wanted.major >= 2 else f'[plugins."{_CRI_1}".containerd]'
    return (
        f"in {wanted.file}:",
        f"  {section}",
        f'    snapshotter = "{wanted.snapshotter}"',
        "    disable_snapshot_annotations = false",
        f"then: {RESTART}",
    )


def _table(value: object) -> Mapping[str, Any]:
    """`value` if it is a table; an empty one otherwise: somebody wrote the file by hand."""
    return value if isinstance(value, Mapping) else {}
