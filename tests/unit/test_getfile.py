"""One file out of a layer: against every vector's tar, through links of all kinds, from damaged layers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ztoc_support import Case, cases, entry

from soci_snapshotter.errors import Integrity, Invalid, NotFound, Unsupported
from soci_snapshotter.formats import zinfo, ztoc
from soci_snapshotter.formats.ztoc import Compression, Entry
from soci_snapshotter.index import getfile
from soci_snapshotter.index.build import build_ztoc
from soci_snapshotter.index.getfile import MAX_LINKS, Contents, read_file

SMALL_SPANS = next(case for case in cases() if case.name == "gnu6-edge1-span64k")


class Layer:
    """A layer's bytes in pieces, as containerd hands them out; `reads` are the ranges asked for."""

    def __init__(self, data: bytes, piece: int = 1 << 20) -> None:
        self.data = data
        self.piece = piece
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, size: int) -> Iterator[bytes]:
        """The bytes; an empty range would mean "to the end" to containerd."""
        assert size > 0
        self.reads.append((offset, offset + size))
        for at in range(offset, offset + size, self.piece):
            yield self.data[at : min(at + self.piece, offset + size)]


def _get(case: Case, path: bytes, layer: Layer | None = None) -> bytes:
    layer = layer or Layer(case.layer)
    decoded = ztoc.decode(case.ztoc)
    found = Contents(decoded.entries).find(path)
    return b"".join(read_file(decoded, case.ztoc, found, len(case.layer), layer))


def _files(tar: bytes) -> dict[bytes, bytes]:
    """Every regular file and hard link of a tar by its name as stored, as tarfile reads it; the last wins."""
    found: dict[bytes, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as opened:
        for member in opened:
            if not (member.isreg() or member.islnk()):
                continue
            name = member.name.encode("utf-8", "surrogateescape")
            if member.islnk():
                found[name] = found[member.linkname.encode("utf-8", "surrogateescape")]
            else:
                file = opened.extractfile(member)
                assert file is not None
                found[name] = file.read()
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_file_of_every_vector(case: Case) -> None:
    """All names of all vectors, hard links and duplicates among them, give the bytes that tarfile gives."""
    decoded = ztoc.decode(case.ztoc)
    contents = Contents(decoded.entries)
    files = _files(case.tar)
    assert files or case.name == "go-empty"
    big = {name: data for name, data in files.items() if len(data) > 5000}
    few = dict(list(files.items())[:300])  # 3,000 small files of one kind would take a while
    for name, data in (big | few).items():
        found = contents.find(name)
        got = b"".join(read_file(decoded, case.ztoc, found, len(case.layer), Layer(case.layer)))
        assert got == data, name


def test_only_the_spans_of_the_file_are_read() -> None:
    """A file in the middle of a layer: its spans' ranges are read, each once, and nothing else."""
    decoded = ztoc.decode(SMALL_SPANS.ztoc)
    found = Contents(decoded.entries).find(b"edge/random-1m.bin")
    spans = zinfo.span_table(decoded)
    layer = Layer(SMALL_SPANS.layer)
    got = b"".join(read_file(decoded, SMALL_SPANS.ztoc, found, len(SMALL_SPANS.layer), layer))
    assert got == _files(SMALL_SPANS.tar)[b"edge/random-1m.bin"]
    wanted = spans.spans_for(found.offset, found.size)
    assert 2 < len(wanted) < len(spans)
    assert layer.reads == [spans.compressed_range(span) for span in wanted]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("piece", [997, 1 << 20])
def test_large_spans_are_read_twice(case: Case, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans too large to be held are read for their digest, then for their content: the same bytes."""
    monkeypatch.setattr(getfile, "_HELD", 0)
    for name, data in list(_files(case.tar).items())[:2]:
        layer = Layer(case.layer, piece)
        assert _get(case, name, layer) == data
        if data:
            assert layer.reads[0] == layer.reads[1]


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("held", [True, False])
def test_damaged_span_is_named_and_yields_nothing(
    at: float, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit: Integrity that names the span, and no byte of that span before it."""
    if not held:
        monkeypatch.setattr(getfile, "_HELD", 0)
    decoded = ztoc.decode(SMALL_SPANS.ztoc)
    found = Contents(decoded.entries).find(b"edge/random-1m.bin")
    spans = zinfo.span_table(decoded)
    wanted = spans.spans_for(found.offset, found.size)
    span = wanted[int(at * len(wanted))]
    data = bytearray(SMALL_SPANS.layer)
    data[spans.digest_range(span)[0] + 40] ^= 4
    got = bytearray()
    with pytest.raises(Integrity, match=f"span {span}: "):
        for piece in read_file(decoded, SMALL_SPANS.ztoc, found, len(data), Layer(bytes(data))):
            got += piece
    assert len(got) <= spans.uncompressed_range(span)[0] - found.offset
    assert bytes(got) == _files(SMALL_SPANS.tar)[b"edge/random-1m.bin"][: len(got)]


def test_short_layer_is_refused() -> None:
    """A layer of another size than the ztoc's, and one whose reads end early, are Integrity."""
    decoded = ztoc.decode(SMALL_SPANS.ztoc)
    found = Contents(decoded.entries).find(b"edge/text-100k.txt")
    with pytest.raises(Integrity, match="compressed_archive_size"):
        list(read_file(decoded, SMALL_SPANS.ztoc, found, 5, Layer(b"12345")))
    with pytest.raises(Integrity, match="span 0: the layer has 500 of its"):
        list(read_file(decoded, SMALL_SPANS.ztoc, found, len(SMALL_SPANS.layer), lambda *_: (bytes(500),)))


def _entries(*described: tuple[str, str, str] | tuple[str, str]) -> list[Entry]:
    """Entries from (type, name[, linkname]); each regular file's offset is its number."""
    return [
        entry(name.encode(), type=kind, offset=number, linkname=(rest or [""])[0].encode())
        for number, (kind, name, *rest) in enumerate(described)
    ]


NAMES = _entries(
    ("dir", "usr/"),
    ("reg", "usr/bin/tool"),  # 1; usr/bin has no entry of its own
    ("symlink", "bin", "usr/bin"),
    ("symlink", "abs", "/usr/bin/tool"),
    ("symlink", "usr/up", "../usr/./bin//tool"),
    ("symlink", "above", "../../../usr/bin/tool"),
    ("hardlink", "hard", "usr/bin/tool"),
    ("hardlink", "hard2", "./hard"),
    ("symlink", "soft", "hard2"),
    ("reg", "bin/added"),  # 9: unpacked through the link
    ("symlink", "a", "b"),
    ("symlink", "b", "c/../a"),
    ("symlink", "gone", "etc/none"),
    ("hardlink", "self", "self"),
    ("hardlink", "later", "after"),
    ("reg", "after"),  # 15
    ("char", "null"),
    ("fifo", "pipe"),
    ("reg", "./dot"),  # 18
    ("reg", "/slash"),  # 19
    ("reg", "twice"),
    ("hardlink", "first", "twice"),
    ("reg", "twice"),  # 22
    ("reg", ".wh.hidden"),  # 23
    ("reg", "file"),
    ("symlink", "into", "implied/deep"),
    ("reg", "implied/deep/file"),
)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("usr/bin/tool", 1),
        ("/usr/bin/tool", 1),
        ("./usr//bin/./tool/", 1),
        ("usr/../usr/bin/tool", 1),
        ("bin/tool", 1),
        ("abs", 1),
        ("usr/up", 1),
        ("above", 1),
        ("hard", 1),
        ("hard2", 1),
        ("soft", 1),
        ("bin/added", 9),
        ("later", 15),
        ("dot", 18),
        ("/dot", 18),
        ("slash", 19),
        ("twice", 22),
        ("first", 20),
        (".wh.hidden", 23),
    ],
)
def test_paths_lead_to_files(path: str, number: int) -> None:
    """Every spelling of a name, and links of every kind, also in the middle of a path, find their file."""
    assert Contents(NAMES).find(path.encode()).offset == number


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("none", NotFound, "not in this layer"),
        ("gone", NotFound, "etc/none"),
        ("file/x", NotFound, "'file' is no directory"),
        ("usr", Invalid, "directory"),
        ("usr/bin", Invalid, "directory"),
        ("bin", Invalid, "directory"),
        ("into", Invalid, "directory"),
        ("", Invalid, "directory"),
        ("/", Invalid, "directory"),
        ("null", Invalid, "character device"),
        ("pipe", Invalid, "named pipe"),
        ("a", Invalid, "circle"),
        ("b", Invalid, "circle"),
        ("a/x", Invalid, "circle"),
        ("self", Invalid, "circle"),
        ("x" * 5000, Invalid, "4095"),
    ],
)
def test_paths_that_lead_nowhere(path: str, error: type[Exception], words: str) -> None:
    """What is no file, is not there, or goes round in a circle is an error that says so."""
    with pytest.raises(error, match=words):
        Contents(NAMES).find(path.encode())


def test_link_chains_end_where_linux_ends_them() -> None:
    """A chain of 40 symbolic links is followed, one of 41 is not."""
    links = _entries(("reg", "l0"), *(("symlink", f"l{n}", f"l{n - 1}") for n in range(1, MAX_LINKS + 2)))
    assert Contents(links).find(b"l40").offset == 0
    with pytest.raises(Invalid, match="circle"):
        Contents(links).find(b"l41")


def test_what_was_replaced_is_gone() -> None:
    """A directory that became a file, and one that came after a file, do not show what was below before."""
    contents = Contents(
        _entries(("reg", "d/x"), ("reg", "d"), ("reg", "e/x"), ("reg", "e"), ("dir", "e"), ("reg", "e/y"))
    )
    assert contents.find(b"d").offset == 1
    assert contents.find(b"e/y").offset == 5
    for path in (b"d/x", b"e/x"):
        with pytest.raises(NotFound):
            contents.find(path)
    replaced = Contents(_entries(("reg", "d/x"), ("symlink", "d", "other"), ("reg", "other/x")))
    assert replaced.find(b"d/x").offset == 2


def test_hostile_link_targets() -> None:
    """Long chains of long targets end in an error, not in a long wait; a target beyond PATH_MAX is none."""
    deep = "/".join(["d"] * 2000)
    links = _entries(*(("symlink", f"l{n}", f"{deep}/../l{n + 1}") for n in range(60)))
    with pytest.raises((Invalid, NotFound)):
        Contents(links).find(b"l0")
    with pytest.raises(NotFound, match="9999 bytes"):
        Contents(_entries(("symlink", "far", "x" * 9999))).find(b"far")


def test_sparse_file_is_refused() -> None:
    """A sparse file's bytes in the tar are not its content."""
    sparse = entry(b"sparse", records=((b"GNU.sparse.major", b"1"),))
    with pytest.raises(Unsupported, match="sparse"):
        Contents([sparse]).find(b"sparse")


@settings(deadline=None)  # building a ztoc starts threads
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    span_size=st.integers(1, 4000),
    gzipped=st.booleans(),
    piece=st.integers(1, 700),
)
def test_random_layers(sizes: list[int], span_size: int, gzipped: bool, piece: int) -> None:
    """Files of any size, spans of any size, pieces of any size, compressed or not: the file's bytes."""
    out = io.BytesIO()
    files = {
        f"f{n}".encode(): bytes((n + at * at) % 251 for at in range(size)) for n, size in enumerate(sizes)
    }
    with tarfile.open(fileobj=out, mode="w:gz" if gzipped else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.decode())
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    blob = out.getvalue()
    compression = Compression.GZIP if gzipped else Compression.UNCOMPRESSED
    built = build_ztoc([blob], compression=compression, span_size=span_size, build_tool="tests")
    decoded = ztoc.decode(built.data)
    contents = Contents(decoded.entries)
    for name, data in files.items():
        got = read_file(decoded, built.data, contents.find(name), len(blob), Layer(blob, piece))
        assert b"".join(got) == data
