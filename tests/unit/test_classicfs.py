"""The classic filesystem's answers, without a kernel."""

import errno
import struct
from pathlib import Path

import pytest

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import fusetree
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.fusemsg import Opcode
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree
from soci_snapshotter.serve.classicfs import Trees

XATTRS = ((b"SCHILY.xattr.security.capability", b"c" * 20), (b"SCHILY.xattr.user.empty", b""))


def entry(name: bytes, kind: str = "reg", offset: int = 512, **fields: object) -> Entry:
    """An entry with plain attributes."""
    plain = Entry(name, kind, offset, 0, b"", 0o644, 0, 0, b"", b"", "2023-11-14T22:13:20Z", 0, 0, ())
    return plain._replace(**fields)


class Served:
    """A tree whose data is a flat file that remembers what was read of it."""

    def __init__(self, directory: Path) -> None:
        entries = [
            entry(b"file", size=1000, records=XATTRS),
            entry(b"link", "symlink", 2560, linkname=b"t" * 600),
            entry(b"d/.wh..wh..opq", offset=3072),
        ]
        self.meta = directory / "meta"
        tree = build_tree(entries)
        image = build_meta(tree, data_size=4096, uuid=b"u" * 16, inherited={}, bottom=False)
        self.meta.write_bytes(image)
        self.reads: list[tuple[int, int, int]] = []
        self.trees = Trees(lambda node: self.read if node == 16 else None)
        self.number = self.trees.add(self.meta, 16)
        self.root = self.trees.root_of(self.number)

    def read(self, unique: int, offset: int, size: int) -> bytes:
        """The flat file's."""
        self.reads.append((unique, offset, size))
        return bytes(size)

    def answer(
        self, opcode: int, node: int, body: bytes = b"", *, uid: int = 0, opens: bool = False
    ) -> bytes | int:
        """An answer of the tree's."""
        return self.trees.answer(opcode, node, body, uid=uid, opens=opens)

    def node(self, name: bytes) -> int:
        """The node that LOOKUP gives for a name in the root."""
        found = self.answer(Opcode.LOOKUP, self.root, name + b"\0")
        assert isinstance(found, bytes)
        node: int = struct.unpack_from("=Q", found)[0]
        return node


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """A tree of a file, a link and an opaque directory."""
    return Served(tmp_path)


def test_reads_are_at_the_tars_own_offsets(served: Served) -> None:
    """A READ becomes one of the flat file, no byte behind the file's end."""
    node = served.node(b"file")
    assert served.trees.read(7, node, 512, 4096) == bytes(488)
    assert served.trees.read(8, node, 1000, 4096) == b""
    assert served.reads == [(7, 512 + 512, 488)]


def test_names_that_are_not_there_are_said_once(served: Served) -> None:
    """The answer has no node, and is valid for ever."""
    answer = served.answer(Opcode.LOOKUP, served.root, b"nothing\0")
    assert isinstance(answer, bytes)
    assert struct.unpack_from("=QQQ", answer) == (0, 0, 2**63 - 1)


def test_xattrs(served: Served) -> None:
    """Sizes are told, room is minded, an empty value is a value; overlayfs's own are known to be absent."""
    node, opaque = served.node(b"file"), served.node(b"d")

    def get(of: int, name: bytes, room: int) -> bytes | int:
        return served.answer(Opcode.GETXATTR, of, struct.pack("=II", room, 0) + name + b"\0")

    assert get(node, b"security.capability", 0) == struct.pack("=II", 20, 0)
    assert get(node, b"security.capability", 20) == b"c" * 20
    assert get(node, b"security.capability", 19) == errno.ERANGE
    assert get(node, b"user.empty", 10) == b""
    assert get(node, b"user.none", 10) == errno.ENODATA
    assert get(node, b"trusted.overlay.metacopy", 10) == errno.ENODATA
    assert get(node, b"trusted.overlay.opaque", 10) == errno.ENODATA
    assert get(opaque, b"trusted.overlay.opaque", 10) == b"y"


def test_only_root_is_shown_trusted_xattrs(served: Served) -> None:
    """As the kernel's own filesystems do."""
    room = struct.pack("=II", 100, 0)
    assert served.answer(Opcode.LISTXATTR, served.node(b"d"), room) == b"trusted.overlay.opaque\0"
    assert served.answer(Opcode.LISTXATTR, served.node(b"d"), room, uid=1000) == b""
    listed = served.answer(Opcode.LISTXATTR, served.node(b"file"), room, uid=1000)
    assert listed == b"security.capability\0user.empty\0"


def test_links_and_opens(served: Served) -> None:
    """A target over a block long; OPEN is answered only where the kernel cannot do without; the rest is refused."""
    assert served.answer(Opcode.READLINK, served.node(b"link")) == b"t" * 600
    assert served.answer(Opcode.OPEN, served.node(b"file")) == errno.ENOSYS
    assert served.answer(Opcode.OPEN, served.node(b"file"), opens=True) != errno.ENOSYS
    assert served.answer(39, served.node(b"file")) == errno.ENOSYS


def test_what_is_gone_is_an_error(served: Served, tmp_path: Path) -> None:
    """A tree that was removed, a flat file that is not served, and a number that is taken."""
    node = served.node(b"file")
    with pytest.raises(ValueError, match="there already"):
        served.trees.add(served.meta, 16, served.number)
    lost = served.trees.add(served.meta, 17)
    with pytest.raises(OSError, match="not served") as caught:
        served.trees.read(1, fusetree.node_of(lost, node & 0xFFFFFFFF), 0, 10)
    assert caught.value.errno == errno.EIO
    served.trees.remove(served.number)
    with pytest.raises(OSError, match="not mounted") as caught:
        served.answer(Opcode.GETATTR, node)
    assert caught.value.errno == errno.ESTALE
    assert served.trees.lookup(Trees.name_of(served.number)) is None
    assert served.trees.lookup(b"m") is None
    assert served.trees.lookup(b"m99999999999") is None


def test_a_damaged_image_fails_its_readers_only(served: Served) -> None:
    """A meta file that was cut behind its superblock: Integrity, and the tree beside it answers."""
    cut = served.meta.with_name("cut")
    cut.write_bytes(served.meta.read_bytes()[:1536])
    number = served.trees.add(cut, 16)
    with pytest.raises(Integrity):
        served.answer(Opcode.LOOKUP, served.trees.root_of(number), b"file\0")
    with pytest.raises(Integrity):
        served.trees.add(Path("/dev/null"), 16)
    assert served.node(b"file")
