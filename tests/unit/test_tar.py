"""The streaming tar parser against the vectors, Python's tarfile, and headers made by hand."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.ztoc_support import Case, cases

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats import tar, ztoc
from soci_snapshotter.formats.tar import TarParser, format_time, parse_number, parse_records, parse_time

if TYPE_CHECKING:
    from soci_snapshotter.formats.ztoc import Entry

END = bytes(1024)


def parse(data: bytes, step: int = 1 << 20) -> tuple[list[Entry], int]:
    """All entries, the tar fed in chunks of `step` bytes."""
    parser = TarParser()
    for at in range(0, len(data), step):
        parser.feed(data[at : at + step])
    return parser.finish()


def header(name: bytes = b"f", flag: bytes = b"0", size: int | bytes = 0, **fields: bytes) -> bytes:
    """A ustar header; `fields` overwrite what is at the places that bear their names."""
    places = {
        "mode": 100,
        "uid": 108,
        "gid": 116,
        "size": 124,
        "mtime": 136,
        "linkname": 157,
        "magic": 257,
        "uname": 265,
        "gname": 297,
        "devmajor": 329,
        "devminor": 337,
        "prefix": 345,
        "trailer": 508,
    }
    block = bytearray(512)
    length = size if isinstance(size, bytes) else b"%011o\0" % size
    values = {"size": length, "mode": b"0000644\0", "magic": b"ustar\x0000"} | fields
    block[: len(name)] = name
    block[156:157] = flag
    for field, value in values.items():
        block[places[field] : places[field] + len(value)] = value
    return seal(block)


def seal(block: bytearray, *, signed: bool = False) -> bytes:
    """The header with its checksum."""
    block[148:156] = b" " * 8
    total = sum(b - 256 if signed and b > 127 else b for b in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def special(flag: bytes, data: bytes) -> bytes:
    """A PAX header or GNU long name."""
    return header(b"special", flag, len(data)) + data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """A PAX header before an entry."""
    return special(b"x", b"".join(record(*r) for r in records))


def one(data: bytes) -> Entry:
    """The only entry."""
    (entry,), _ = parse(data + END)
    return entry


@pytest.mark.parametrize("step", [512, 700, 5001, 1 << 20])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_vectors_parse_to_what_the_go_tool_saw(case: Case, step: int) -> None:
    """Entries and the size at which the end was recognised equal the Go tool's, whatever the chunks."""
    decoded = ztoc.decode(case.ztoc)
    assert parse(case.tar, step) == (decoded.entries, decoded.uncompressed_size)


def test_single_bytes_are_enough() -> None:
    """A tar with long names, fed byte by byte, parses the same."""
    data = special(b"L", b"n" * 600) + pax((b"uid", b"7")) + header(size=3) + b"abc" + bytes(509) + END
    assert parse(data, 1) == parse(data)
    assert parse(data)[0][0].offset == 512 + 1024 + 1024 + 512


NAME = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=120),
    st.binary(min_size=1, max_size=20).map(
        lambda raw: raw.replace(b"\0", b"x").decode("utf-8", "surrogateescape")
    ),
    st.integers(90, 300).map(lambda n: "d/" * (n // 4) + "n" * (n // 2)),
)
TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}


@st.composite
def infos(draw: st.DrawFn) -> tarfile.TarInfo:
    """A member of any type."""
    info = tarfile.TarInfo(draw(NAME))
    info.type = draw(st.sampled_from(sorted(TYPES)))
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**21))
    info.mtime = draw(st.one_of(st.integers(0, 2**33 - 1), st.integers(-(2**40), 2**40)))
    info.uname, info.gname = draw(st.sampled_from(["", "root", "üser"])), draw(st.sampled_from(["", "wheel"]))
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        info.linkname = draw(NAME)
    if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = draw(st.integers(0, 2**21 - 1)), draw(st.integers(0, 2**21 - 1))
    if info.type == tarfile.REGTYPE:
        info.size = draw(st.integers(0, 2000))
    return info


@settings(deadline=None, max_examples=300)
@given(st.lists(infos(), max_size=6), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_what_tarfile_writes_is_read(members: list[tarfile.TarInfo], form: int, data: st.DataObject) -> None:
    """Any member that Python's tarfile writes, in GNU or PAX format, is read back, in chunks of any size."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as out:
        for info in members:
            out.addfile(info, io.BytesIO(bytes(info.size)))
    raw = file.getvalue()
    entries, size = parse(raw, data.draw(st.integers(1, len(raw))))
    file.seek(0)
    with tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as back:
        expected = back.getmembers()
        assert size == back.offset + 1024  # it stops at the first zero block
    assert len(entries) == len(members)
    for got, info, seen in zip(entries, members, expected, strict=True):
        slash = "/" if info.isdir() and not info.name.endswith("/") else ""
        assert got.name.decode("utf-8", "surrogateescape") == info.name + slash
        assert got.linkname.decode("utf-8", "surrogateescape") == info.linkname
        assert (got.type, got.mode, got.uid, got.gid) == (TYPES[info.type], info.mode, info.uid, info.gid)
        assert (got.uname.decode(), got.gname.decode()) == (info.uname, info.gname)
        assert (got.offset, got.size if info.isreg() else 0) == (seen.offset_data, info.size)
        assert got.mod_time == format_time(int(info.mtime) * 10**9)
        if info.ischr() or info.isblk():
            assert (got.devmajor, got.devminor) == (info.devmajor, info.devminor)


def test_prefixes_follow_the_magic() -> None:
    """ustar has 155 bytes of prefix, star 131 of them, v7 none."""
    prefix = b"p" * 140
    assert one(header(prefix=prefix)).name == prefix + b"/f"
    assert one(header(prefix=prefix, trailer=b"tar\0")).name == prefix[:131] + b"/f"
    assert one(header(prefix=prefix, magic=bytes(8))).name == b"f"


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        (b"usr/lib", b"usr/lib/f"),
        (b"p" * 155, b"p" * 155 + b"/f"),
        (b"12345670123\x00sub/dir", b"12345670123/f"),
        (b"12345670123\x0012345670123\0", b"f"),
        (b"\x80" + bytes(10) + b"\1", b"f"),
        (b"usr/\xc3\xa9", b"f"),
        (b"0123456 890 ", b"0123456 890 /f"),
    ],
)
def test_a_prefix_in_gnu_format_is_read_as_go_reads_it(prefix: bytes, name: bytes) -> None:
    """Go before 1.8 wrote a prefix where GNU has two times; what is no time, and ASCII, is a prefix."""
    assert one(header(prefix=prefix, magic=b"ustar  \0")).name == name


def test_without_magic_owners_and_devices_are_not_read() -> None:
    """A v7 header ends after its link name, whatever stands behind it."""
    block = bytearray(
        header(flag=b"3", uname=b"user", gname=b"group", devmajor=b"0000007\0", devminor=b"0000011\0")
    )
    new = one(bytes(block))
    block[257:265] = bytes(8)
    old = one(seal(block))
    assert (new.uname, new.gname, new.devmajor, new.devminor) == (b"user", b"group", 7, 9)
    assert (old.uname, old.gname, old.devmajor, old.devminor) == (b"", b"", 0, 0)


def test_the_nul_type_is_a_file_or_a_directory() -> None:
    """Type NUL with a trailing slash is a directory and has no data; type "0" stays a file."""
    assert one(header(b"d/", b"\0", 512)).type == "dir"
    assert one(header(b"d", b"\0")).type == "reg"
    assert one(header(b"d/", b"0")).type == "reg"


def test_only_files_have_data() -> None:
    """A size in a hard link's header is kept in the entry, but no data follows."""
    (link, after), _ = parse(header(b"l", b"1", 5000, linkname=b"f") + header(b"g") + END)
    assert (link.size, link.offset, after.offset) == (5000, 512, 1024)


def test_pax_overrides_the_header_and_long_names_override_pax() -> None:
    """The last PAX header counts, its empty values override nothing, and GNU names beat it, for one entry."""
    before = pax((b"path", b"lost"), (b"uname", b"lost"))
    records = ((b"gid", b""), (b"linkpath", b"P"), (b"mtime", b"-1.5"), (b"path", b"p"), (b"size", b"3"))
    data = before + pax(*records) + special(b"L", b"long\0junk") + special(b"K", b"") + header(size=9)
    (first, second), _ = parse(data + b"abc" + bytes(509) + header(b"next") + END)
    assert (first.name, first.linkname, first.size, first.uname) == (b"long", b"P", 3, b"")
    assert first.mod_time == "1969-12-31T23:59:58.5Z"
    assert first.records == records
    assert (second.name, second.records, second.linkname) == (b"next", (), b"")


def test_records_are_sorted_and_the_last_of_a_key_counts() -> None:
    """Values may hold NUL, newline and equals signs, and may be empty."""
    entry = one(pax((b"z", b"1"), (b"a", b"\0\n=x"), (b"SCHILY.xattr.user.e", b""), (b"z", b"2")) + header())
    assert entry.records == ((b"SCHILY.xattr.user.e", b""), (b"a", b"\0\n=x"), (b"z", b"2"))


def test_owner_numbers_wrap_and_modes_do_not() -> None:
    """uid and gid are taken modulo 2^32, from headers and records; mode is kept whole."""
    entry = one(header(uid=b"\xff" * 8, gid=b"\x80\0\0\1\0\0\0\5", mode=b"\xff" * 7 + b"\xfe"))
    assert (entry.uid, entry.gid, entry.mode) == (2**32 - 1, 5, -2)
    entry = one(pax((b"uid", b"-2"), (b"gid", b"+4294967297")) + header())
    assert (entry.uid, entry.gid) == (2**32 - 2, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b" 644 \0\0\0", 0o644),
        (b"\0 644\0\0\0", 0o644),
        (b"644\0junk", 0o644),
        (bytes(8), 0),
        (b"        ", 0),
        (b"\x80\0\0\0\0\0\1\0", 256),
        (b"\xff" * 8, -1),
        (b"\xff" * 12, -1),
        (b"\x80\0\0\0\x7f" + b"\xff" * 7, 2**63 - 1),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    """Octal with spaces and NULs around it, base 256 with its sign, and nothing at all."""
    assert parse_number(field, "x") == value


@pytest.mark.parametrize(
    "field",
    [b"0000648\0", b"+644\0\0\0\0", b"-1\0\0\0\0\0\0", b"0o64\0\0\0\0", b"6_4\0\0\0\0\0", b"6 4\0\0\0\0\0"],
)
def test_what_is_no_number_is_refused(field: bytes) -> None:
    """Python's int() takes more than tar does."""
    with pytest.raises(Integrity, match="x is"):
        parse_number(field, "x")


def test_numbers_over_64_bits_are_refused() -> None:
    """A base-256 number that no int64 holds."""
    with pytest.raises(Integrity, match="64 bits"):
        parse_number(b"\x80\0\0\0" + b"\xff" * 8, "x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"0", "1970-01-01T00:00:00Z"),
        (b"1700000000.000000000", "2023-11-14T22:13:20Z"),
        (b"1.100000", "1970-01-01T00:00:01.1Z"),
        (b"1.1234567899", "1970-01-01T00:00:01.123456789Z"),
        (b"+1.", "1970-01-01T00:00:01Z"),
        (b"-1.5", "1969-12-31T23:59:58.5Z"),
        (b"-0.25", "1969-12-31T23:59:59.75Z"),
        (b"253402300799.9", "9999-12-31T23:59:59.9Z"),
        (b"253402300800", ""),
        (b"-62135596801", "0000-12-31T23:59:59Z"),
        (b"-62167219200", "0000-01-01T00:00:00Z"),
        (b"-62167219200.1", ""),
        (b"9223372036854775807", ""),
    ],
)
def test_times(text: bytes, shown: str) -> None:
    """Fractions, negative times, and the years that RFC 3339 has; others give nothing."""
    assert format_time(parse_time(text)) == shown


@pytest.mark.parametrize("text", [b".5", b"-", b"1.5x", b"1e3", b" 1", b"9223372036854775808", b"1" * 5000])
def test_bad_times_are_refused(text: bytes) -> None:
    """An mtime without integer seconds ends the layer's index."""
    with pytest.raises(Integrity, match="mtime"):
        one(pax((b"mtime", text)) + header())


@pytest.mark.parametrize(
    "data",
    [
        b"6 a=b\n\0",
        b"7 a=b\n",
        b"5 a=b\n",
        b"4 =b\n",
        b"5 =bc\n",
        b"6 abcd\n",
        b"6 a=bc",
        b"x a=b\n",
        b"-6 a=b\n",
        b"99999999999999999999999 a=b\n",
        b"0 a=b\n",
        b"10 path=a\0\n",
        b"7 a\0=b\n",
        b"\0",
    ],
)
def test_malformed_records_are_refused(data: bytes) -> None:
    """Records that lie about their length, lack a key or hide a NUL in a name."""
    with pytest.raises(Integrity, match="PAX"):
        parse_records(data)


def test_the_end_is_two_zero_blocks_or_the_files_end() -> None:
    """The end is two zero blocks, or one at the end of the file, or none; what follows is not looked at."""
    entry = header(size=3) + b"abc" + bytes(509)
    assert parse(entry + END + b"junk" * 1000)[1] == 2048
    assert parse(entry + bytes(512))[1] == 1536
    assert parse(entry)[1] == 1024
    assert parse(entry[:515])[1] == 515
    assert parse(b"") == ([], 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=3) + b"ab", "cut off"),
        (header() + header()[:100], "cut off"),
        (special(b"L", b"n" * 600)[:600], "cut off"),
        (special(b"x", b"")[:512] + b"x", "cut off"),
        (bytes(512) + header(), "zero block"),
        (b"x" * 512, "checksum"),
        (header()[:-1] + b"x", "checksum"),
        (b"\x1f\x8b" + bytes(510), "checksum"),
        (header(size=b"\xff" * 12), "size is -1"),
        (pax((b"size", b"-1")) + header(), "size is -1"),
        (pax((b"size", b"many")) + header(), "size"),
        (header(flag=b"x", size=(1 << 20) + 1), "1048577"),
        (header(flag=b"L", size=b"\xff" * 12), "-1 bytes"),
        (header(mode=b"rwxr-xr-"), "mode"),
        (header(size=1 << 32), "cut off"),
    ],
)
def test_broken_tars_are_integrity_errors(data: bytes, message: str) -> None:
    """Each way a tar can be broken is named."""
    with pytest.raises(Integrity, match=message):
        parse(data)


@pytest.mark.parametrize("flag", [b"g", b"S", b"V", b"M", b"7", b"A", b"X"])
def test_unusual_types_are_unsupported_by_name(flag: bytes) -> None:
    """A global PAX header, a GNU sparse file and other types end the index, naming the entry."""
    with pytest.raises(Unsupported, match="odd-one"):
        parse(header() + header(b"odd-one", flag) + END)


def test_pax_sparse_files_are_unsupported_by_name() -> None:
    """Their data is not at their offsets, so no index can describe them."""
    with pytest.raises(Unsupported, match=r"sparse-one.*PAX sparse"):
        parse(pax((b"GNU.sparse.major", b"1")) + header(b"sparse-one") + END)


def test_signed_checksums_are_accepted() -> None:
    """Some old writers summed signed bytes."""
    block = bytearray(header(b"\xe9\xe9\xe9"))
    assert one(seal(block, signed=True)).name == b"\xe9\xe9\xe9"


def test_too_many_entries_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar with more entries than a reader of the index would take is refused at build."""
    monkeypatch.setattr(tar, "MAX_ENTRIES", 2)
    assert len(parse(header() * 2 + END)[0]) == 2
    with pytest.raises(Unsupported, match="more than 2 entries"):
        parse(header() * 3 + END)


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_mutated_tars_raise_only_our_errors(data: st.DataObject) -> None:
    """Whatever bytes a tar is made of, the parser returns entries or one of two errors."""
    raw = bytearray(
        pax((b"path", b"p"), (b"mtime", b"1.5")) + special(b"L", b"long") + header(size=3) + bytes(512)
    )
    raw += header(b"l", b"2", linkname=b"f") + END
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for at in range(0, len(raw) - 1024, 512):  # so that more than the checksum is tried
        if raw[at + 257 : at + 262] == b"ustar" and data.draw(st.booleans()):
            raw[at : at + 512] = seal(raw[at : at + 512])
    try:
        parse(bytes(raw), data.draw(st.integers(1, 2000)))
    except (Integrity, Unsupported) as error:
        assert str(error).startswith("tar: ")
