"""One FUSE connection: /dev/fuse opened, mounted where no path leads, INIT answered.

The mount is made with fsopen, fsconfig and fsmount and never attached, so that it is in no mount table: `df`
and `find` never touch it and nothing needs unmounting. Files in it are reached as /proc/self/fd/<mount
fd>/<name>. The connection ends when the last descriptor of its /dev/fuse closes, whoever holds it.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass, field
from socket import socket
from types import TracebackType

from soci_snapshotter.errors import Config, Unsupported
from soci_snapshotter.formats import fusemsg
from soci_snapshotter.linux import mounts, syscalls

DEVICE = "/dev/fuse"


@dataclass(slots=True)
class Connection:
    """A FUSE connection that is past INIT; closes its descriptors when left.

    `fresh` is False for one taken over: its requests in flight must be asked for again (RESEND) before
    reading. `held` keeps the keeper from starting its deadline.
    """

    fuse_fd: int
    mount_fd: int
    init_reply: bytes
    fresh: bool
    held: socket | None = field(default=None)

    @property
    def flags(self) -> fusemsg.Init:
        """The capabilities that were agreed on."""
        return fusemsg.init_reply_flags(self.init_reply)

    @property
    def can_resend(self) -> bool:
        """Whether another process may take this connection over without losing requests (Linux 6.9)."""
        return bool(self.flags & fusemsg.Init.HAS_RESEND)

    @property
    def alive(self) -> bool:
        """Whether the kernel still serves it: it was not aborted."""
        poll = select.poll()
        poll.register(self.fuse_fd, 0)  # POLLERR comes unasked
        return not poll.poll(0)

    @property
    def device(self) -> int:
        """What tells the mount from every other of this boot."""
        return syscalls.device_of(self.mount_fd)

    def close(self) -> None:
        """Give up the descriptors; the connection lives on if somebody else (the keeper) holds them."""
        for descriptor in (self.fuse_fd, self.mount_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.fuse_fd = self.mount_fd = -1
        if self.held is not None:
            self.held.close()
            self.held = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_device() -> int:
    """A close-on-exec descriptor of /dev/fuse. Unsupported or Config with what to do when it cannot be
    opened.
    """
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unsupported(f"{DEVICE} does not exist: load the module with `modprobe fuse`") from None
    except PermissionError:
        raise Config(f"{DEVICE} may not be opened: run as root, with access to device 10:229") from None
    except OSError as problem:
        raise Unsupported(f"{DEVICE} cannot be opened ({problem.strerror}): load the module `fuse`") from None


def connect() -> Connection:
    """A new connection, its detached mount made and INIT answered. Raises as open_device, or Unsupported."""
    fuse_fd = open_device()
    mount_fd = -1
    try:
        settings: dict[bytes, bytes | None] = {
            b"source": b"soci",
            b"fd": b"%d" % fuse_fd,
            b"rootmode": b"40000",
            b"user_id": b"0",
            b"group_id": b"0",
            b"allow_other": None,
            b"default_permissions": None,
            b"ro": None,
        }
        attributes = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV
        mount_fd = mounts.detached_mount(b"fuse", settings, attributes | mounts.MOUNT_ATTR_NOEXEC)
        return Connection(fuse_fd, mount_fd, _answer_init(fuse_fd), fresh=True)
    except OSError as problem:
        _close(fuse_fd, mount_fd)
        if problem.errno == errno.EPERM:
            raise Config("a FUSE filesystem may not be mounted: run as root with CAP_SYS_ADMIN") from None
        raise Unsupported(
            f"a FUSE filesystem cannot be mounted ({problem}); Linux 5.2 or newer is needed"
        ) from None
    except BaseException:
        _close(fuse_fd, mount_fd)
        raise


def abort_file(mount_fd: int) -> int | None:
    """A close-on-exec descriptor; writing to it aborts the connection of the FUSE mount `mount_fd`, whoever holds it.

    The file of that name in fusectl (Documentation/filesystems/fuse.rst), which need not be mounted. None where the
    kernel has it not.
    """
    try:
        control = mounts.detached_mount(b"fusectl", {}, 0)
    except OSError:
        return None
    try:
        name = f"{os.minor(syscalls.device_of(mount_fd))}/abort"
        return os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
    except OSError:
        return None
    finally:
        os.close(control)


def _answer_init(fuse_fd: int) -> bytes:
    buffer = os.read(fuse_fd, fusemsg.READ_BUFFER)
    header = fusemsg.request(buffer, len(buffer))
    if header.opcode != fusemsg.Opcode.INIT:
        raise Unsupported(f"the kernel's first FUSE request is {header.opcode}, not INIT")
    body = fusemsg.init_reply(fusemsg.init_request(buffer[fusemsg.IN_HEADER_SIZE :]))
    os.write(fuse_fd, fusemsg.reply(header.unique, body))
    return body


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
