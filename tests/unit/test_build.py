"""Building ztocs: the Go tool's bytes, any tar through any gzip, and layers that must be refused."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import resource
import tarfile
import threading
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_tar import header, record, special
from tests.unit.ztoc_support import GO_TOOL, Case, cases, member, read_range, read_span

from soci_snapshotter.errors import Integrity, Invalid, Unsupported
from soci_snapshotter.formats import digest, ztoc
from soci_snapshotter.formats import tar as tar_format
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index import build, spool
from soci_snapshotter.index.build import BuiltZtoc, build_ztoc, write_ztoc
from soci_snapshotter.linux import checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LIBRARIES = [library for library in (checkpoints.zlib_ng(), checkpoints.zlib()) if library]


def chunked(data: bytes, step: int) -> Iterator[bytes]:
    """`data` in chunks of `step` bytes."""
    return (data[at : at + step] for at in range(0, len(data), step))


def built(
    layer: bytes | Iterable[bytes], compression: Compression = Compression.GZIP, span_size: int = 4 << 20
) -> BuiltZtoc:
    """The ztoc of a layer given whole or in chunks."""
    chunks = [layer] if isinstance(layer, bytes) else layer
    return build_ztoc(chunks, compression=compression, span_size=span_size, build_tool="tests")


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of regular files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return file.getvalue()


def assert_usable(result: BuiltZtoc, layer: bytes, tar: bytes) -> None:
    """What a daemon would do: decode, check span digests, rebuild the tar, read each file alone."""
    decoded = ztoc.decode(result.data)
    table = span_table(decoded, len(layer))
    for i in range(len(table)):
        start, end = table.digest_range(i)
        assert "sha256:" + hashlib.sha256(layer[start:end]).hexdigest() == table.digest(i)
    assert b"".join(read_span(table, i, layer, result.data) for i in range(len(table))) == tar
    assert result.diff_id == digest.sha256(tar)
    assert result.layer_digest == digest.sha256(layer)
    assert result.digest == digest.sha256(result.data)
    assert (result.layer_size, result.uncompressed_size) == (len(layer), len(tar))
    assert decoded.entries == result.entries
    for entry in decoded.entries:
        if entry.type == "reg":
            content = read_range(table, entry.offset, entry.size, layer, result.data)
            assert content == tar[entry.offset : entry.offset + entry.size]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_ztoc_written_to_a_file_is_the_same(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every checkpoint and every two entries put aside, the file has the Go tool's bytes, and is alone."""
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    monkeypatch.setattr(tar_format, "BATCH", 2)
    written = write_ztoc(
        chunked(case.layer, 4099),
        tmp_path / "ztoc",
        compression=case.compression,
        span_size=case.raw["span_size"],
        build_tool=GO_TOOL,
        expected=digest.parse(case.raw["layer_digest"]),
    )
    assert (tmp_path / "ztoc").read_bytes() == case.ztoc
    assert (written.digest, written.size) == (case.raw["ztoc_digest"], len(case.ztoc))
    assert written.diff_id == "sha256:" + case.raw["tar_sha256"]
    assert (written.layer_size, written.uncompressed_size) == (case.raw["layer_size"], case.raw["tar_size"])
    assert [file.name for file in tmp_path.iterdir()] == ["ztoc"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("step", [1 << 20, 4099])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_vectors_are_built_byte_for_byte(
    case: Case, step: int, library: checkpoints.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a vector's layer, span size and tool string come the Go tool's bytes, by either library."""
    monkeypatch.setattr(checkpoints, "load", lambda: library)
    result = build_ztoc(
        chunked(case.layer, step),
        compression=case.compression,
        span_size=case.raw["span_size"],
        build_tool=GO_TOOL,
        expected=digest.parse(case.raw["layer_digest"]),
    )
    assert result.data == case.ztoc
    assert result.digest == case.raw["ztoc_digest"]
    assert result.diff_id == "sha256:" + case.raw["tar_sha256"]
    assert (result.layer_size, result.uncompressed_size) == (case.raw["layer_size"], case.raw["tar_size"])


def test_both_inflate_libraries_are_there() -> None:
    """The tests above ran with zlib-ng's wheel and with libz.so.1, and the first is what is used."""
    assert [library.name for library in LIBRARIES] == ["zlib-ng", "zlib"]
    assert checkpoints.load().name == "zlib-ng"


NAMES = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1, max_size=20),
    st.integers(100, 300).map(lambda n: "d/" * (n // 3) + "f"),
    st.binary(min_size=1, max_size=9).map(
        lambda b: b.replace(b"\0", b"_").decode("utf-8", "surrogateescape")
    ),
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Content that compresses well, a little, or not at all, up to some blocks' worth."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    unit = rng.randbytes(draw(st.sampled_from([1, 30, 3000, 60_000])))
    return (unit * draw(st.sampled_from([1, 2, 100])))[: draw(st.integers(0, 200_000))]


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(NAMES, contents(), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from([None, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK]),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 5000, 65536, 4 << 20]),
    st.integers(1, 100_000),
)
def test_any_tar_in_any_gzip_is_usable(
    files: dict[str, bytes],
    form: int,
    members: list[tuple[int, int | None, float]],
    span_size: int,
    step: int,
) -> None:
    """Random tars in one to four members of any level and flushing: every file reads back through spans."""
    tar = tar_of(files, form)
    cuts = sorted(int(share * len(tar)) for _, _, share in members[1:])
    parts = [tar[a:b] for a, b in zip([0, *cuts], [*cuts, len(tar)], strict=True)]
    layer = b"".join(
        member(part, level, flush, 7001) for part, (level, flush, _) in zip(parts, members, strict=True)
    )
    result = built(chunked(layer, step), span_size=span_size)
    assert_usable(result, layer, tar)
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as reader:
        seen = [(i.name.encode("utf-8", "surrogateescape"), i.offset_data, i.size) for i in reader]
    # tarfile takes a slash off the end of a PAX path; the ztoc keeps the tar's own string (FORMATS.md, 1).
    assert [(e.name.rstrip(b"/"), e.offset, e.size) for e in result.entries] == [
        (name.rstrip(b"/"), offset, size) for name, offset, size in seen
    ]


@settings(deadline=None, max_examples=15)
@given(st.dictionaries(NAMES, contents(), max_size=4), st.integers(500, 1 << 20), st.integers(1, 100_000))
def test_any_uncompressed_tar_is_usable(files: dict[str, bytes], span_size: int, step: int) -> None:
    """The same for layers that are not compressed, whatever the chunks and the span size."""
    tar = tar_of(files)
    result = built(chunked(tar, step), Compression.UNCOMPRESSED, span_size)
    assert_usable(result, tar, tar)
    assert len(span_table(ztoc.decode(result.data))) == -(-len(tar) // span_size)


TAR = tar_of({"a": b"first" * 1000, "b": random.Random(2).randbytes(50_000)})
LAYER = member(TAR)


def test_the_libraries_agree_on_checkpoints_of_small_blocks() -> None:
    """zlib-ng and libz.so.1 stop at the same bits on a stream of many small blocks in several members."""
    layer = member(TAR, 6, zlib.Z_PARTIAL_FLUSH, 101) + member(b"") + member(TAR, 1) + member(TAR, 0)
    found = []
    for library in LIBRARIES:
        kept: list[bytes] = []
        with checkpoints.Scanner(1, library, keep=kept.append) as scanner:
            output = b"".join(scanner.feed(layer))
            rest, head = scanner.finish()
        assert output + rest == TAR * 3
        found.append((scanner.points, head, kept))
    assert found[0] == found[1]
    assert {point.bits for point in found[0][0]} == set(range(8))


def test_an_empty_uncompressed_layer_is_described() -> None:
    """No bytes: no spans, no entries, max_span_id -1."""
    result = built([], Compression.UNCOMPRESSED)
    decoded = ztoc.decode(result.data)
    assert (decoded.max_span_id, decoded.entries, len(span_table(decoded, 0))) == (-1, [], 0)


def test_zeros_after_the_last_member_belong_to_the_last_span() -> None:
    """zlib-ng and libz.so.1 stop at the same bits on a stream of many small blocks and some members."""
    for step in (1, 100, 1 << 20):
        layer = LAYER + bytes(3000)
        result = built(chunked(layer, step))
        assert_usable(result, layer, TAR)
        table = span_table(ztoc.decode(result.data))
        assert table.compressed_range(len(table) - 1)[1] == len(layer)


def _with_header(flags: int, extra: bytes) -> bytes:
    return LAYER[:3] + bytes([flags]) + LAYER[4:10] + extra + LAYER[10:]


@pytest.mark.parametrize(
    ("flags", "extra"),
    [(8, b"name\0"), (16, b"comment\0"), (4, b"\5\0extra"), (4 | 8 | 16, b"\5\0extraname\0comment\0")],
)
def test_optional_header_fields_are_accepted(flags: int, extra: bytes) -> None:
    """File name, comment and extra field move the first checkpoint and nothing else."""
    layer = _with_header(flags, extra)
    result = built(chunked(layer, 3))
    assert_usable(result, layer, TAR)
    assert span_table(ztoc.decode(result.data)).compressed_range(0)[0] == 10 + len(extra)


SPOILT = bytearray(LAYER)
SPOILT[-6] ^= 1  # in the CRC
WRONG_LENGTH = bytearray(LAYER)
WRONG_LENGTH[-1] ^= 1

BROKEN = [
    ("empty", b"", "cut off after 0"),
    ("no gzip", TAR, "not gzip"),
    ("zlib wrapper", zlib.compress(TAR), "not gzip"),
    ("zeros only", bytes(1000), "not gzip"),
    ("header only", LAYER[:10], "cut off"),
    ("cut in the header", LAYER[:5], "cut off"),
    ("cut in the middle", LAYER[: len(LAYER) // 2], "cut off"),
    ("cut in the trailer", LAYER[:-1], "cut off"),
    ("bad CRC", bytes(SPOILT), "data check"),
    ("bad length", bytes(WRONG_LENGTH), "length check"),
    ("garbage behind", LAYER + b"garbage", "something else"),
    ("garbage behind zeros", LAYER + bytes(100) + b"g", "something else"),
    ("half a member behind", LAYER + LAYER[:40], "cut off"),
    ("a member behind zeros", LAYER + bytes(512) + LAYER, "something else"),
    ("no tar", member(b"x" * 5000), "checksum"),
    ("a cut tar", member(TAR[:3000]), "tar: cut off"),
    ("a cut header", member(TAR[:300]), "tar: cut off"),
    ("a size below zero", member(header(size=b"\xff" * 12) + bytes(1024)), "size is -1"),
    (
        "a size that is no number",
        member(header(size=b"12345x78901\0") + bytes(1024)),
        "size is b'12345x78901'",
    ),
    (
        "a size beyond 64 bits",
        member(header(size=b"\x80" + b"\x7f" * 11) + bytes(1024)),
        "not fit into 64 bits",
    ),
    ("a size beyond the tar", member(header(size=1 << 32) + bytes(1024)), "tar: cut off after 1536 bytes"),
    (
        "a PAX size beyond the tar",
        member(special(b"x", record(b"size", b"%d" % (1 << 40))) + header() + bytes(1024)),
        "tar: cut off",
    ),
    (
        "a PAX size that is no number",
        member(special(b"x", record(b"size", b"1e9")) + header() + bytes(1024)),
        "PAX record size is b'1e9'",
    ),
    ("a huge PAX header", member(header(flag=b"x", size=1 << 30) + bytes(1024)), "not within 0"),
]


@pytest.mark.parametrize("step", [1 << 20, 7])
@pytest.mark.parametrize(("layer", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_layers_are_integrity_errors(layer: bytes, message: str, step: int) -> None:
    """Each way a layer can be broken is named, and no thread is left behind."""
    before = threading.active_count()
    with pytest.raises(Integrity, match=message) as caught:
        built(chunked(layer, step))
    assert "\n" not in str(caught.value)
    assert threading.active_count() == before


@pytest.mark.parametrize("cut", [300, 3000, 512 + 4999])
def test_an_uncompressed_tar_that_ends_early_is_an_integrity_error(cut: int) -> None:
    """Whether it ends within a header or within a file's content."""
    with pytest.raises(Integrity, match=f"tar: cut off after {cut} bytes"):
        built(TAR[:cut], Compression.UNCOMPRESSED)


def test_a_failed_build_leaves_the_old_ztoc_and_nothing_else(tmp_path: Path) -> None:
    """A truncated layer, and a disk that is full when the ztoc is written; the error names the file."""
    output = tmp_path / "ztoc"
    output.write_bytes(b"old")

    def write(layer: bytes) -> None:
        write_ztoc([layer], output, compression=Compression.GZIP, build_tool="tests")

    with pytest.raises(Integrity, match="cut off"):
        write(LAYER[:-1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=str(output)):
            write(LAYER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_mutated_layers_raise_only_our_errors(data: st.DataObject) -> None:
    """A layer with changed bytes is refused, or (a changed header field) indexed; nothing else happens."""
    layer = bytearray(member(TAR[:9000], data.draw(st.integers(0, 9))))
    for _ in range(data.draw(st.integers(1, 3))):
        layer[data.draw(st.integers(0, len(layer) - 1))] = data.draw(st.integers(0, 255))
    with pytest.raises((Integrity, Unsupported)):
        built(bytes(layer[:-1]))
    try:
        built(bytes(layer))
    except (Integrity, Unsupported):
        return


def test_a_gzip_labelled_as_a_tar_is_refused() -> None:
    """The media type decides; a gzip blob that claims to be uncompressed gets no ztoc, and is named as such."""
    with pytest.raises(Unsupported, match="is gzip"):
        built(LAYER, Compression.UNCOMPRESSED)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_another_layers_digest_is_an_integrity_error(algorithm: str) -> None:
    """Bytes that are not the descriptor's give no index; the right digest, of either algorithm, does."""
    right = digest.parse(f"{algorithm}:{hashlib.new(algorithm, LAYER).hexdigest()}")
    wrong = digest.parse(f"{algorithm}:{hashlib.new(algorithm, b'').hexdigest()}")
    kind = Compression.GZIP
    result = build_ztoc([LAYER], compression=kind, span_size=4096, build_tool="t", expected=right)
    assert result.layer_digest == right
    with pytest.raises(Integrity, match=wrong):
        build_ztoc([LAYER], compression=kind, span_size=4096, build_tool="t", expected=wrong)


def test_what_no_index_can_describe_is_unsupported() -> None:
    """A global PAX header or a sparse file is refused, naming the entry."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("holes")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        out.addfile(info)
    with pytest.raises(Unsupported, match="holes"):
        built(member(file.getvalue()))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}):
        pass
    with pytest.raises(Unsupported, match="global PAX header"):
        built(member(file.getvalue()))


def test_a_tail_counts_for_the_diff_id_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the tar's end belongs to the DiffID, whatever it holds; too much of it is refused."""
    tar = TAR + b"tail" * 5000
    result = built(member(tar))
    assert_usable(result, member(tar), tar)
    assert ztoc.decode(result.data).uncompressed_size < len(TAR)
    monkeypatch.setattr(build, "MAX_TAIL", 20_000)
    with pytest.raises(Unsupported, match="after the tar's end"):
        built(member(tar))


@pytest.mark.parametrize("compression", list(Compression))
def test_what_cannot_become_a_ztoc_is_not_read_to_its_end(
    compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb behind the tar's end, and spans that would exceed the format's 2 GiB (here: 1 MiB), stop the build."""
    read = 0

    def layer(tar: bytes, more: bytes, count: int) -> Iterator[bytes]:
        nonlocal read
        read = 0
        deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
        for piece in (tar, *[more] * count):
            read += 1
            # One deflate block each, so that each can become a span.
            yield deflate.compress(piece) + deflate.flush(zlib.Z_FULL_FLUSH) if zipped else piece

    zipped = compression is Compression.GZIP
    with pytest.raises(Unsupported, match="after the tar's end"):
        built(layer(TAR, bytes(1 << 20), 100), compression)
    assert read < 20
    monkeypatch.setattr(build, "MAX_SIZE", 1 << 20)
    big = tarfile.TarInfo("big")
    big.size = 1000 << 20
    with pytest.raises(Unsupported, match="larger span size"):
        built(layer(big.tobuf(), random.Random(4).randbytes(1 << 16), 1000), compression, span_size=100)
    assert read < 100


@pytest.mark.parametrize("compression", list(Compression))
def test_an_impossible_span_size_is_invalid(compression: Compression) -> None:
    """A span size below 1 is the caller's mistake."""
    with pytest.raises(Invalid, match="span size"):
        built(LAYER, compression, 0)


def test_an_error_of_the_source_comes_through() -> None:
    """What the chunks' source raises reaches the caller, and the hashing threads end."""

    def chunks() -> Iterator[bytes]:
        yield LAYER[:100]
        raise OSError("gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="gone"):
        built(chunks())
    assert threading.active_count() == before


def test_memory_stays_bounded() -> None:
    """A layer of 200 MB of tar, whose ztoc is small, is indexed in a few MB of memory."""
    block = random.Random(3).randbytes(1 << 20)
    size = 200 << 20
    info = tarfile.TarInfo("big")
    info.size = size

    def layer() -> Iterator[bytes]:
        deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
        yield deflate.compress(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size >> 20):
            yield deflate.compress(block)
        yield deflate.compress(bytes(1024)) + deflate.flush()

    tracemalloc.start()
    result = built(layer(), span_size=64 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.uncompressed_size == size + 1536
    assert peak < 24 << 20


def test_memory_does_not_grow_with_entries_and_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 entries and 700 checkpoints, 30 MB if they were kept, are indexed in less than half."""
    monkeypatch.setattr(tar_format, "BATCH", 512)
    files = b"".join(header(b"file%d" % n, size=1000) + bytes(1024) for n in range(1000))
    part = member(files, 6, zlib.Z_FULL_FLUSH, 20_000)
    tracemalloc.start()
    written = write_ztoc(
        itertools.chain(itertools.repeat(part, 10), [member(bytes(1024))]),
        tmp_path / "ztoc",
        compression=Compression.GZIP,
        span_size=10_000,
        build_tool="tests",
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    decoded = ztoc.decode((tmp_path / "ztoc").read_bytes())
    assert (len(decoded.entries), written.uncompressed_size) == (10_000, 10 * len(files) + 1024)
    assert len(decoded.span_digests) > 700
    assert peak < 12 << 20


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.UNCOMPRESSED])
def test_a_sink_gets_the_tar_with_its_tail(tmp_path: Path, compression: Compression) -> None:
    """The uncompressed bytes, all of them in order, zeros after the tar's end included; the ztoc is the same."""
    plain = tar_of({f"f{n}": random.Random(n).randbytes(70_000) for n in range(50)}) + bytes(4096)
    layer = member(plain) if compression is Compression.GZIP else plain
    taken = bytearray()
    written = write_ztoc(
        chunked(layer, 100_000),
        tmp_path / "ztoc",
        compression=compression,
        build_tool="tests",
        sink=taken.extend,
    )
    assert bytes(taken) == plain
    assert written.digest == built(layer, compression).digest


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.UNCOMPRESSED])
def test_a_sink_that_fails_ends_the_pass(tmp_path: Path, compression: Compression) -> None:
    """A full disk is told long before the layer's end, and nothing is left."""
    plain = tar_of({"f": random.Random(1).randbytes(30 << 20)})
    layer = member(plain) if compression is Compression.GZIP else plain
    chunks = list(chunked(layer, 1 << 20))
    given: list[bytes] = []

    def full(_piece: bytes | memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_ztoc(
            (given.append(chunk) or chunk for chunk in chunks),
            tmp_path / "ztoc",
            compression=compression,
            build_tool="tests",
            sink=full,
        )
    assert len(given) < len(chunks) // 2
    assert not list(tmp_path.iterdir())


def test_building_twice_gives_the_same_bytes() -> None:
    """No clock, no order of threads and no chunking shows in the result."""
    assert built(LAYER, span_size=4096) == built(chunked(LAYER, 777), span_size=4096)
