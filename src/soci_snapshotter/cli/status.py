"""`soci status`: the daemon's layers, how much of each is here, and what the daemon did."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from ..errors import NotFound, Remote
from ..policy.status import LIMIT, SOCKET, DaemonStatus, LayerStatus, State, of_image
from .context import image_reference
from .doctor import DAEMON_ADDRESS
from .tables import print_table

_SECONDS = 10.0
"""The daemon answers from memory; one that is this late is stuck."""
_HEADER = ("IMAGE", "LAYER", "STATE", "SPANS", "FETCHED", "DISK", "READS", "ERRORS", "MOUNTS")


@click.command(name="status")
@click.argument("image", required=False)
@click.option(
    "--daemon-address",
    metavar="PATH",
    envvar="SOCI_SNAPSHOTTER_ADDRESS",
    default=DAEMON_ADDRESS,
    show_default=True,
    show_envvar=True,
    help="The daemon's socket; its status is at status.sock beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything the daemon says, as one object.")
def status_command(*, image: str | None, daemon_address: str, as_json: bool) -> None:
    """Show the layers that the daemon serves, all or those of IMAGE: how much of each is here, and its state.

    lazy: bytes come when they are read. filling: some are on their way. proving: all are here and being hashed.
    complete: nothing needs the daemon any more. condemned: the bytes are not what the image says; none is served.
    """
    address = Path(daemon_address.removeprefix("unix://"))
    status = ask(address.parent / SOCKET)
    if image is not None:
        layers = of_image(status.layers, str(image_reference(image)))
        if not layers:
            raise NotFound(f"{image}: the daemon has no layer of it; pull it, or see soci why {image}")
        status = msgspec.structs.replace(status, layers=tuple(layers))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(status), indent=2).decode())
    else:
        _print(status)


def ask(path: Path) -> DaemonStatus:
    """What the daemon says at its status socket. Raises Remote when there is none, or it does not answer."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(LIMIT)
        if response.status != http.client.OK:
            raise Remote(f"{path}: the daemon answered {response.status}; its log says why")
        return msgspec.json.decode(body, type=DaemonStatus)
    except (FileNotFoundError, ConnectionRefusedError):
        raise Remote(
            f"no daemon answers at {path}; start soci-snapshotter-grpc, or name its socket with "
            "--daemon-address"
        ) from None
    except PermissionError:
        raise Remote(f"{path}: only root may ask the daemon; run as root") from None
    except (OSError, http.client.HTTPException) as error:
        raise Remote(f"{path}: the daemon does not answer: {error}") from None
    except msgspec.MsgspecError as error:
        raise Remote(f"{path}: answered by another version of the daemon: {error}") from None
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        """http.client's hook."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(str(self._path))


def _print(status: DaemonStatus) -> None:
    background = status.background
    fetch = f"{background.queued} layers wait for it" if background.enabled else "off"
    print(
        f"daemon {status.version}, pid {status.pid}, up {_duration(status.uptime)}; "
        f"background fetch: {fetch}; {status.flights_queued} requests queued"
    )
    print_table(_HEADER, [_row(layer) for layer in sorted(status.layers, key=_order)])
    if counted := {name: value for name, value in sorted(status.counters.items()) if value}:
        print()
        print_table(("COUNTER", "VALUE"), [(name, str(value)) for name, value in counted.items()])


def _order(layer: LayerStatus) -> tuple[str, str]:
    return (layer.images[0] if layer.images else "", layer.layer)


def _row(layer: LayerStatus) -> Sequence[str]:
    others = f" (+{len(layer.images) - 1})" if len(layer.images) > 1 else ""
    return (
        (layer.images[0] if layer.images else "-") + others,
        layer.layer[:19],
        layer.state.value + (f" ({layer.flights})" if layer.state is State.FILLING and layer.flights else ""),
        f"{layer.spans_present}/{layer.spans}",
        f"{_size(layer.fetched)}/{_size(layer.size)}",
        _size(layer.disk),
        str(layer.reads),
        str(layer.errors),
        ",".join(Path(mount).name for mount in layer.mounts) or "-",
    )


def _size(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
