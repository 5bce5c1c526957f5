"""From a layer as it comes over the network to its data.tar and ztoc, as one pass in a worker process.

The blob lies in a file that grows from its start while it is fetched. Whatever its form, the uncompressed bytes are
written at their own offsets, and the tar's headers are read on the way into a ztoc. Of gzip, and of a tar as it is,
that ztoc is the one `soci create` makes: the layer can be fetched by its spans later. Of zstd, and of gzip through an
external decompressor, which finds no checkpoints, it describes the tar, and serves nobody but this node.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import WrittenZtoc, write_ztoc
from soci_snapshotter.linux.sparse import punch_hole
from soci_snapshotter.policy.eager import GZIP, algorithm_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PIECE = 1 << 20  # what is read, hashed and handed on at a time
_PUNCH = (
    16 << 20
)  # what was read of the blob goes back to the disk in steps of this, mostly before it was ever written
_BLOCK = 64 << 10  # runs of zeros this long, at such offsets, are left as holes
_ZEROS = bytes(_BLOCK)
_LOOK = 64 << 20  # bytes between two looks at how full the disk is
_WINDOW_LOG = 27  # 128 MiB: what the zstd program takes without being told to take more
_SECTOR = 512  # tar's and EROFS's block


class UnpackRequest(msgspec.Struct, frozen=True):
    """One layer."""

    blob: str
    """The file; sparse, and `blob_size` bytes long in the end."""
    blob_size: int
    layer_digest: str
    directory: str
    """Where data.tar and ztoc are made; it exists."""
    span_size: int
    build_tool: str
    decompressors: dict[str, tuple[str, ...]]
    """Algorithm -> program (absolute path) and arguments: it reads the layer from stdin and writes the tar to stdout."""
    reserve: int
    """Bytes that must stay free on the disk."""
    keep_blob: bool
    """Somebody else reads the blob's file, too: leave it whole."""


class Unpacked(msgspec.Struct, frozen=True):
    """What a layer turned out to be."""

    ztoc_digest: str
    ztoc_size: int
    diff_id: str
    tar_size: int
    """Bytes that diff_id covers; data.tar is these, and zeros up to a multiple of 512."""
    spans: int
    by_span: bool
    """Whether the ztoc is of the layer as the registry has it."""


def unpack(request: UnpackRequest, wait: Callable[[int], int]) -> Unpacked:
    """Make data.tar and ztoc. `wait(n)` returns how many bytes of the blob are here, once that is more than n.

    Raises Integrity when the bytes are not what the layer's digest says or not what their form promises, Unsupported
    for a tar that no ztoc describes, OSError (ENOSPC) before the disk is full. The files are the caller's to remove.
    """
    directory = Path(request.directory)
    blob = os.open(request.blob, os.O_RDWR | os.O_CLOEXEC)
    try:
        data = os.open(directory / "data.tar", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            made, by_span = _unpack(request, blob, wait, _Tar(data, request.reserve))
            os.ftruncate(data, -(-made.uncompressed_size // _SECTOR) * _SECTOR)
        finally:
            os.close(data)
    finally:
        os.close(blob)
    return Unpacked(
        ztoc_digest=str(made.digest),
        ztoc_size=made.size,
        diff_id=str(made.diff_id),
        tar_size=made.uncompressed_size,
        spans=made.spans,
        by_span=by_span,
    )


def _unpack(
    request: UnpackRequest, blob: int, wait: Callable[[int], int], tar: _Tar
) -> tuple[WrittenZtoc, bool]:
    expected = digests.parse(request.layer_digest)
    available = 0
    while available < min(4, request.blob_size):
        available = wait(available)
    head = os.pread(blob, 4, 0)
    pieces = _pieces(request, blob, wait, available)
    algorithm = algorithm_of(head)
    program = request.decompressors.get(algorithm or "")

    def write(chunks: Iterable[bytes], form: Compression, expected: digests.Digest | None) -> WrittenZtoc:
        return write_ztoc(
            chunks,
            Path(request.directory) / "ztoc",
            compression=form,
            span_size=request.span_size,
            build_tool=request.build_tool,
            expected=expected,
            sink=tar.write,
        )

    if program is None and algorithm == GZIP:
        return write(pieces, Compression.GZIP, expected), True
    if algorithm is None:
        return write(pieces, Compression.UNCOMPRESSED, expected), True
    blob_hash = hashlib.new(expected.algorithm)
    hashed = _hashed(pieces, blob_hash)
    tar_pieces = _through(program, hashed) if program else _unzstd(hashed)
    with closing(tar_pieces):
        made = write(tar_pieces, Compression.UNCOMPRESSED, None)
    if blob_hash.hexdigest() != expected.hex:
        raise Integrity(f"its bytes have the digest {expected.algorithm}:{blob_hash.hexdigest()}")
    return made, False


def _pieces(request: UnpackRequest, blob: int, wait: Callable[[int], int], available: int) -> Iterator[bytes]:
    """The blob as it comes in, `available` bytes of it already; what was read is given back to the disk, unless
    somebody else wants it.
    """
    position = punched = 0
    while position < request.blob_size:
        if position == available:
            available = wait(position)
        piece = os.pread(blob, min(_PIECE, available - position), position)
        if not piece:
            raise Integrity(f"the layer ends after {position} of {request.blob_size} bytes")
        yield piece
        position += len(piece)
        if position - punched >= _PUNCH and not request.keep_blob:
            punch_hole(blob, punched, position - punched)
            punched = position


def _hashed(pieces: Iterable[bytes], into: hashlib._Hash) -> Iterator[bytes]:
    for piece in pieces:
        into.update(piece)
        yield piece


class _Tar:
    """Writes the tar at its own offsets. Long runs of zeros become holes."""

    def __init__(self, fd: int, reserve: int) -> None:
        self._fd = fd
        self._reserve = reserve
        self._position = 0
        self._look = 0

    def write(self, piece: bytes | memoryview) -> None:
        """The next bytes. OSError (ENOSPC) when less than the reserve would be left."""
        if self._position >= self._look:
            self._check_room()
            self._look = self._position + _LOOK
        view = memoryview(piece)
        start = at = 0
        while at < len(view):
            end = min(at + _BLOCK - (self._position + at) % _BLOCK, len(view))
            if not view[at] and view[at:end] == _ZEROS[: end - at]:
                self._put(view[start:at], self._position + start)
                start = end
            at = end
        self._put(view[start:], self._position + start)
        self._position += len(view)

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def _check_room(self) -> None:
        """What a layer inflates to nobody knows: this is its bound. All else on the node needs room, too."""
        status = os.fstatvfs(self._fd)
        if status.f_bavail * status.f_frsize < self._reserve:
            text = f"{os.strerror(errno.ENOSPC)}: less than {self._reserve >> 20} MiB left, after {self._position} bytes"
            raise OSError(errno.ENOSPC, text)


def _unzstd(pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
    """Frames one after the other, skippable ones among them (RFC 8878)."""
    frame: zstd.ZstdDecompressor | None = None
    try:
        for piece in pieces:
            rest = piece
            while rest or (frame is not None and not frame.needs_input):
                if frame is None:
                    frame = zstd.ZstdDecompressor(
                        options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
                    )
                data = frame.decompress(rest, _PIECE)
                rest = b""
                if frame.eof:
                    rest, frame = frame.unused_data, None
                if data:
                    yield data
    except zstd.ZstdError as error:
        raise Integrity(f"the layer is not valid zstd: {error}") from None
    if frame is not None:
        raise Integrity("the zstd stream is cut off")


def _through(command: tuple[str, ...], pieces: Iterator[bytes]) -> Generator[bytes, None, None]:
    """What the external decompressor makes of `pieces`. All of them are read, also when it does not want the last."""
    errors: list[Exception] = []
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            bufsize=0,
        )
        feeder = threading.Thread(target=_feed, args=(process, pieces, errors), name="feed", daemon=True)
        feeder.start()
        try:
            assert process.stdout is not None  # noqa: S101 - made with a pipe
            while data := process.stdout.read(_PIECE):
                yield data
            feeder.join()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if errors:
            raise errors[0]
        if code:
            said.seek(0)
            words = said.read(300).decode(errors="replace").strip().replace("\n", "; ")
            raise Integrity(f"{command[0]} could not decompress the layer (exit {code}): {words}")


def _feed(process: subprocess.Popen[bytes], pieces: Iterator[bytes], errors: list[Exception]) -> None:
    assert process.stdin is not None  # noqa: S101 - made with a pipe
    try:
        wanted = True
        for piece in pieces:
            view = memoryview(piece)
            while view and wanted:
                try:
                    view = view[process.stdin.write(view) :]
                except BrokenPipeError:  # it has seen the end, or given up: its exit code tells
                    wanted = False
    except Exception as error:  # raised where the tar is read
        errors.append(error)
        process.kill()
    finally:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
