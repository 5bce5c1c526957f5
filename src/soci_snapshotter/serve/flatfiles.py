"""The FUSE loop: one flat file per lazy layer, and trees of layers (classicfs), in one detached mount.

Reader threads share the ONE descriptor (a clone's requests would fail when its holder dies). They never wait:
a file that lacks the bytes parks the request and returns None; whoever brings the bytes calls reply(). Two
threads are enough for that reason.

Ending: a thread blocked in read(2) of /dev/fuse cannot be interrupted from Python, and polling would cost two
more system calls per request. So close() makes one LOOKUP of a reserved name per thread, and each thread ends
after answering one.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from soci_snapshotter.errors import Invalid, SociError
from soci_snapshotter.formats import fusemsg
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.fusemsg import IN_HEADER_SIZE, OUT_HEADER, OUT_HEADER_SIZE, Opcode
from soci_snapshotter.formats.fusetree import TREE_BIT
from soci_snapshotter.linux.fusedev import Connection
from soci_snapshotter.policy.counters import FUSE_FAILURES
from soci_snapshotter.serve.classicfs import Read, Trees

_log = logging.getLogger(__name__)

FIRST_NODE = 16  # below are the root (1) and room for nodes of our own
FILE_MODE = stat.S_IFREG | 0o400
ROOT_MODE = stat.S_IFDIR | 0o500
_END = b"end"  # no decimal number, hence never a file
_FAILURES: dict[int, str] = {
    Opcode.READ: "fuse_file_read_failure_count",
    Opcode.GETATTR: "fuse_node_getattr_failure_count",
    Opcode.LISTXATTR: "fuse_node_listxattr_failure_count",
    Opcode.LOOKUP: "fuse_node_lookup_failure_count",
    Opcode.OPEN: "fuse_node_open_failure_count",
    Opcode.READDIR: "fuse_node_readdir_failure_count",
    Opcode.READDIRPLUS: "fuse_node_readdir_failure_count",
}
_NO_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class FlatFile(Protocol):
    """What one node serves: `size` bytes (a multiple of 512), never changing."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read(self, unique: int, offset: int, size: int) -> Buffer | None:
        """Exactly `size` bytes at `offset` (always inside the file), or None: parked, reply() follows later.

        Runs on a reader thread and must not block on anything but a local disk. An OSError (or a SociError)
        raised becomes the reader's errno.
        """


class FuseServer:
    """Serves flat files on a FUSE connection; its reader threads run between __enter__ and __exit__.

    Files may be added and removed at any time, but those of a connection taken over must be there before it
    is entered: what was in flight is resent at once. Whoever calls reply() is stopped before the server is
    left. `on_release(node_id)` runs on a reader thread when the last handle known to be open on a node
    closes: it must not block. `on_abort()` runs on one when somebody aborted the connection: nothing can be served
    on it any more. Node ids are never given to another file: the kernel remembers them.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        threads: int = 2,
        on_release: Callable[[int], None] | None = None,
        on_abort: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._fd = connection.fuse_fd
        self._files: dict[int, FlatFile] = {}
        self.trees = Trees(self._reader_of)
        """The layers that the kernel does not mount with EROFS."""
        # Told once that OPEN is not needed, the kernel saves two of the four requests for a small file.
        self._answers_open = not connection.flags & fusemsg.Init.NO_OPEN_SUPPORT
        self._opens: dict[int, int] = {}
        self.failures = dict.fromkeys(FUSE_FAILURES, 0)
        """Requests that failed; a flat file's failures are its own to count."""
        self._lock = threading.Lock()  # guards _opens
        self._on_release = on_release
        self._on_abort = on_abort
        self._ending = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"fuse-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> FuseServer:
        if not self._connection.fresh:
            # Before any reader: afterwards it would ask again for what this process is already working on.
            os.write(self._fd, fusemsg.notification(fusemsg.NOTIFY_RESEND))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the reader threads. The connection stays open; requests queue for whoever serves it next."""
        if self._ending:
            return
        self._ending = True
        living = [thread for thread in self._threads if thread.is_alive()]
        for _ in living:  # counted before: any of them may answer, and one that ends meanwhile had its LOOKUP
            try:
                os.stat(_END, dir_fd=self._connection.mount_fd, follow_symlinks=False)
            except OSError:
                pass  # ENOENT from a thread that ends now; ENOTCONN when the connection is gone
        for thread in living:
            thread.join()

    def add(self, node_id: int, file: FlatFile, *, opens: int = 0) -> None:
        """Serve `file` as `node_id` (16 and up); `opens` handles on it are known from before a takeover."""
        if node_id < FIRST_NODE or file.size % 512:
            raise Invalid(
                f"flat file {node_id} of {file.size} bytes: ids begin at 16, sizes are multiples of 512"
            )
        if opens:
            with self._lock:
                self._opens[node_id] = opens
        self._files[node_id] = file

    def remove(self, node_id: int) -> None:
        """Forget a file: reads of it fail with EIO from now on."""
        self._files.pop(node_id, None)
        with self._lock:
            self._opens.pop(node_id, None)

    @property
    def mount_fd(self) -> int:
        """The FUSE mount."""
        return self._connection.mount_fd

    def _reader_of(self, node_id: int) -> Read | None:
        file = self._files.get(node_id)
        return None if file is None else file.read

    def node_of(self, path: bytes) -> int | None:
        """The node id whose path_of() is `path`; None for another file."""
        prefix = self.path_of(0)[:-1]
        return int(path[len(prefix) :]) if path.startswith(prefix) else None

    def opened(self, node_id: int) -> None:
        """Somebody uses a file without a handle of the kernel's on it."""
        with self._lock:
            self._opens[node_id] = self._opens.get(node_id, 0) + 1

    def closed(self, node_id: int) -> None:
        """What opened() was told of has ended. As with the last handle, `on_release` may be called."""
        self._release(node_id)

    def in_use(self, node_id: int) -> bool:
        """Whether somebody has the file open, or the kernel may still remember it. Not for a FUSE thread.

        For a connection that was taken over: a RELEASE that the process before this one was told of does not come again.
        """
        with self._lock:
            if self._opens.get(node_id):
                return True
        self._notify(fusemsg.invalidate_entry(fusemsg.ROOT_ID, b"%d" % node_id))
        return self._notify(fusemsg.invalidate_attributes(node_id))

    def forget_tree(self, number: int) -> bool:
        """Make the kernel let go of a tree that is not mounted any more; whether it has no inode of it now.

        What is still in use keeps being served, and another call may have more success. Not for a FUSE thread.
        """
        root = self.trees.root_of(number)
        # From below: a page that is still being fetched holds up its directory only, and not the mount's root.
        self._forget_names(root, self.trees.names(root))
        self._notify(fusemsg.invalidate_entry(fusemsg.ROOT_ID, Trees.name_of(number)))
        if not self._notify(fusemsg.invalidate_attributes(root)):
            return True
        # A directory that was in use when its name went keeps what was looked up in it since.
        stack, known = [root], [root]
        while stack:
            for _, node, is_directory in self.trees.names(stack.pop()):
                if is_directory:
                    stack.append(node)
                    if self._notify(fusemsg.invalidate_attributes(node)):
                        known.append(node)
        for node in reversed(known):
            self._forget_names(node, self.trees.names(node))
        return not self._notify(fusemsg.invalidate_attributes(root))

    def _forget_names(self, directory: int, names: list[tuple[bytes, int, bool]]) -> None:
        for name, _, _ in names:
            self._notify(fusemsg.invalidate_entry(directory, name))

    def _notify(self, message: bytes) -> bool:
        """Whether the kernel knew what the message is about."""
        try:
            os.write(self._fd, message)
        except OSError as problem:
            if problem.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTCONN}:
                raise
            return False
        return True

    def path_of(self, node_id: int) -> bytes:
        """Where this process (and a mount(2) it makes) finds the file, until the mount descriptor closes."""
        return b"/proc/self/fd/%d/%d" % (self._connection.mount_fd, node_id)

    def reply(self, unique: int, data: Buffer) -> None:
        """Answer a parked READ with all its bytes; `data` has items of one byte. Any thread may call it."""
        self._send(OUT_HEADER.pack(OUT_HEADER_SIZE + len(data), 0, unique), data)

    def reply_error(self, unique: int, code: int) -> None:
        """Answer a parked READ with an errno, a positive number."""
        self._send(fusemsg.error_reply(unique, code), b"")

    def _send(self, header: bytes, body: Buffer) -> None:
        try:
            os.writev(self._fd, (header, body))
        except OSError as problem:
            # ENOENT: the reader was killed, or a resent request is answered a second time. ENODEV: aborted.
            if problem.errno not in {errno.ENOENT, errno.ENODEV}:
                _log.error(
                    "FUSE reply refused by the kernel", extra={"errno": problem.errno, "bytes": len(body)}
                )

    def _serve(self) -> None:
        fd, peek = self._fd, fusemsg.PEEK.unpack_from
        buffer = bytearray(fusemsg.READ_BUFFER)
        targets = [buffer]
        read_opcode = int(Opcode.READ)
        while True:
            try:
                length = os.readv(fd, targets)
            except OSError as problem:
                if problem.errno in {errno.ENOENT, errno.EAGAIN}:
                    continue  # the request was taken back while being read
                if problem.errno != errno.ENODEV:
                    _log.error("reading /dev/fuse failed", extra={"errno": problem.errno})
                if self._on_abort is not None and not self._ending:
                    self._on_abort()
                return
            _, opcode, unique, node, offset, size = peek(buffer)
            if opcode == read_opcode:
                self._read(unique, node, offset, size)
            elif not self._other(
                opcode, unique, node, fusemsg.uid_in(buffer), bytes(buffer[IN_HEADER_SIZE:length])
            ):
                return

    def _read(self, unique: int, node: int, offset: int, size: int) -> None:
        file = self._files.get(node)
        try:
            if file is not None:
                left = file.size - offset
                data = file.read(unique, offset, size if size <= left else left) if left > 0 else b""
            elif node & TREE_BIT:
                data = self.trees.read(unique, node, offset, size)
            else:
                raise OSError(errno.EIO, "not served any more")
        except (OSError, SociError) as problem:
            if file is None:
                self._failed(Opcode.READ)
            self.reply_error(unique, problem.errno or errno.EIO)
        except Exception:
            _log.exception("reading a file failed", extra={"node": node, "offset": offset, "size": size})
            self._failed(Opcode.READ)
            self.reply_error(unique, errno.EIO)
        else:
            if data is not None:
                self._send(OUT_HEADER.pack(OUT_HEADER_SIZE + len(data), 0, unique), data)

    def _failed(self, opcode: int) -> None:
        self.failures[_FAILURES.get(opcode, FUSE_FAILURES[-1])] += 1

    def _of_tree(self, opcode: int, unique: int, node: int, body: bytes, uid: int) -> None:
        """Answer anything but READ about a file of a tree."""
        try:
            answer = self.trees.answer(opcode, node, body, uid=uid, opens=self._answers_open)
        except (OSError, SociError) as problem:
            self._failed(opcode)
            answer = problem.errno or errno.EIO
        except Exception:
            _log.exception("serving a layer's tree failed", extra={"node": node, "opcode": opcode})
            self._failed(opcode)
            answer = errno.EIO
        if isinstance(answer, int):
            self.reply_error(unique, answer)
        else:
            self.reply(unique, answer)

    def _other(self, opcode: int, unique: int, node: int, uid: int, body: bytes) -> bool:
        """Answer anything but READ; False when this thread is to end."""
        if opcode in _NO_REPLY:
            return True
        if node & TREE_BIT:
            self._of_tree(opcode, unique, node, body, uid)
            return True
        if opcode == Opcode.LOOKUP:
            name = fusemsg.name_in(body)
            answer = self._lookup(node, name)
            if answer is None:
                self.reply_error(unique, errno.ENOENT)
                return not (self._ending and name == _END)
        elif opcode == Opcode.GETATTR:
            answer = self._attributes(node)
        elif opcode == Opcode.OPEN:
            answer = self._open(node)
        elif opcode == Opcode.STATFS:
            answer = fusemsg.statfs_out()
        elif opcode in {Opcode.RELEASE, Opcode.FLUSH, Opcode.DESTROY}:
            answer = b""
        elif opcode in {Opcode.GETXATTR, Opcode.LISTXATTR}:  # ENOSYS would hide those of trees as well
            self.reply_error(unique, errno.ENODATA)
            return True
        else:
            self.reply_error(unique, errno.ENOSYS)
            return True
        if answer is None:
            self.reply_error(unique, errno.ESTALE)
        else:
            self.reply(unique, answer)
        if opcode == Opcode.RELEASE:
            self._release(node)
        return True

    def _lookup(self, parent: int, name: bytes) -> bytes | None:
        if parent == fusemsg.ROOT_ID and (tree := self.trees.lookup(name)) is not None:
            return tree
        node = int(name) if name.isdigit() and len(name) < 20 and not name.startswith(b"0") else 0
        file = self._files.get(node)
        if parent != fusemsg.ROOT_ID or file is None:
            return None
        return fusemsg.entry_out(node, FILE_MODE, file.size)

    def _attributes(self, node: int) -> bytes | None:
        if node == fusemsg.ROOT_ID:
            return fusemsg.attr_out(node, ROOT_MODE, 0)
        file = self._files.get(node)
        return None if file is None else fusemsg.attr_out(node, FILE_MODE, file.size)

    def _open(self, node: int) -> bytes | None:
        if node not in self._files:
            return None
        self.opened(node)
        return fusemsg.open_out(node)  # the handle is the node: nothing to remember across a restart

    def _release(self, node: int) -> None:
        with self._lock:
            left = self._opens.get(node, 0) - 1
            if left > 0:
                self._opens[node] = left
                return
            self._opens.pop(node, None)
        if self._on_release is not None:
            try:
                self._on_release(node)
            except Exception:
                _log.exception("on_release failed", extra={"node": node})
