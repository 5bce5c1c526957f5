"""A node with any version of containerd, configured as docs/containerd.md says, and an image with a pause beside it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

from harness.containerd import start_containerd, unmount_below
from harness.daemon import CONFIG, start_daemon
from harness.images import layer_from_dir, push, shell_rootfs, write_layout
from harness.lazyrig import Rig
from harness.proxy import Proxy
from harness.registries import start_registry

_DOC = Path(__file__).resolve().parents[1] / "docs" / "containerd.md"
_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
PAUSE = "pause"


def documented(title: str) -> str:
    """The TOML in docs/containerd.md whose first line is the comment `title`."""
    blocks = re.findall(r"^```toml\n# ([^\n]+)\n(.*?)^```$", _DOC.read_text(), re.MULTILINE | re.DOTALL)
    [text] = [body for name, body in blocks if name == title]
    return text


def settings(text: str, socket: Path, sandbox: str) -> str:
    """A configuration from the document, with the socket and the sandbox image of here."""
    text = text.replace(_ADDRESS, str(socket))
    # Where the tests themselves run in a container, nobody may lower an oom_score_adj.
    restrict = "restrict_oom_score_adj = true"
    if "version = 3" in text:
        images, runtime = "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"
        lines = [f'[plugins."{images}".pinned_images]', f'  sandbox = "{sandbox}"']
        lines += [f'[plugins."{runtime}"]', f"  {restrict}"]
    else:
        lines = ['[plugins."io.containerd.grpc.v1.cri"]', f'  sandbox_image = "{sandbox}"', f"  {restrict}"]
    return "\n".join([text, *lines, ""])


@contextlib.contextmanager
def containerd_rig(
    major: int, bin_dir: Path | None, *, config: str = CONFIG, text: str = "", extra: str = ""
) -> Iterator[Rig]:
    """A registry, this containerd with the CRI on, and our daemon; nothing is left behind.

    `text` replaces what the document says for this version; `extra` is TOML after it; `config` is our daemon's.
    """
    base = Path(tempfile.mkdtemp(prefix="soci-", dir="/var/tmp"))
    socket = base / "run" / "soci.sock"
    try:
        with start_registry(base / "registry") as registry, Proxy(registry.address) as proxy:
            pause = f"{registry.host}/{PAUSE}:1"
            rootfs = shell_rootfs(base / "pause-rootfs", ("dash", "sleep"))
            layer = layer_from_dir(rootfs)
            push(write_layout(base / PAUSE, [layer], command=("/bin/sleep", "infinity")), pause)
            text = settings(text or documented(f"containerd {major}.x"), socket, pause)
            with (
                start_containerd(
                    base / "c", bin_dir=bin_dir, settings=text, extra_config=extra
                ) as containerd,
                start_daemon(base / "d", address=socket, config=config) as daemon,
            ):
                rig = Rig(base, proxy, registry, containerd, daemon)
                if "soci" in text:
                    rig.reconnected()
                yield rig
    finally:
        unmount_below(base)
        rmtree(base)
