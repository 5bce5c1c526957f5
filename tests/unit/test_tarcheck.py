"""Tables of contents against the headers of their tars: honest ones pass, a lie that would show is named."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.tar_strategies import Member, encode, layers, tars
from tests.unit.ztoc_support import Case, cases, small_ztoc

from soci_snapshotter.errors import SociError, Unsupported
from soci_snapshotter.formats import ztoc, ztoc_writer
from soci_snapshotter.formats.tar import TarParser
from soci_snapshotter.formats.tarcheck import Difference, after, compare, compare_end, read_headers, unlike
from soci_snapshotter.formats.toc import Entry, Outline
from soci_snapshotter.formats.tree import Clock, build_tree


def difference(stated: list[Entry], tar: bytes) -> Difference | None:
    """What a check of the whole tar finds."""
    headers = read_headers(0, [tar])
    return compare(stated, headers, Clock()) or compare_end(headers, len(stated))


def entries_of(tar: bytes) -> list[Entry]:
    """The table that our builder makes."""
    parser = TarParser()
    parser.feed(tar)
    return parser.finish()[0]


def plain(**changes: object) -> bytes:
    """A file of 5 bytes; another stands before it, an empty one behind it."""
    member = Member(b"usr/f", "reg", content=b"12345", mode=0o755, uid=1, gid=2, mtime=1_600_000_000 * 10**9)
    about = [Member(b"a", "reg", content=b"x"), replace(member, **changes), Member(b"z", "reg")]  # type: ignore[arg-type]
    return b"".join(map(encode, about)) + bytes(1024)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_tables_of_the_go_tool_pass(case: Case) -> None:
    """Every sample, as it is and with its times written in another zone, as the Go tool does away from UTC."""
    table = ztoc.decode(case.ztoc).entries
    assert difference(table, case.tar) is None
    zone = timezone(timedelta(hours=5, minutes=30))
    moved = [
        entry._replace(mod_time=datetime.fromisoformat(entry.mod_time).astimezone(zone).isoformat())
        for entry in table
        if "." not in entry.mod_time and entry.mod_time > "1000"
    ]
    assert all(entry.mod_time.endswith("+05:30") for entry in moved)
    if len(moved) == len(table):
        assert difference(moved, case.tar) is None


@given(tars())
@settings(max_examples=150, deadline=None)
def test_what_the_builder_indexes_passes(tar: bytes) -> None:
    """Any tar against its own table."""
    assert difference(entries_of(tar), tar) is None


# What each kind of entry shows, and another value for it.
LIES = {
    "type": ("reg", lambda old: "dir" if old != "dir" else "fifo"),
    "name": ("reg", lambda old: old + b"x"),
    "uncompressed_size": ("reg", lambda old: old + 1),
    "linkname": ("symlink", lambda old: old + b"x"),
    "mode": ("reg", lambda old: old ^ 0o4000),
    "uid": ("reg", lambda old: old ^ 1),
    "gid": ("reg", lambda old: old ^ 0x80000000),
    "mod_time": ("reg", lambda old: "2020-02-29T01:02:03.000000004Z"),
    "devmajor": ("char", lambda old: old + 1),
    "devminor": ("block", lambda old: old + 1),
}
NAMES = {"uncompressed_size": "size"}


@pytest.mark.parametrize("field", LIES)
@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_lie_is_named(field: str, data: st.DataObject) -> None:
    """One changed field of one entry in any layer: found, with the entry's name and the field's."""
    kind, change = LIES[field]
    odd = Member(b"it", kind, link=b"to" if kind == "symlink" else b"", mtime=1)
    tar = b"".join(map(encode, [*data.draw(layers()), odd, *data.draw(layers())])) + bytes(1024)
    table = entries_of(tar)
    number = next(n for n, entry in enumerate(table) if entry.name == b"it")
    own = NAMES.get(field, field)
    lie = table[number]._replace(**{own: change(getattr(table[number], own))})
    found = difference([*table[:number], lie, *table[number + 1 :]], tar)
    assert found is not None
    assert (found.name, found.field) == (lie.name, field)


@pytest.mark.parametrize(
    ("stated", "field"),
    [
        ((), "xattr b'user.k'"),
        (((b"SCHILY.xattr.user.k", b"w"),), "xattr b'user.k'"),
        (((b"SCHILY.xattr.user.k", b"v"), (b"SCHILY.xattr.user.l", b"")), "xattr b'user.l'"),
    ],
)
def test_a_lie_about_xattrs_is_named(stated: tuple[tuple[bytes, bytes], ...], field: str) -> None:
    """A missing, another and an invented xattr; the line says nothing of their values."""
    tar = plain(xattrs=((b"user.k", b"v"),))
    first, entry, last = entries_of(tar)
    found = difference([first, entry._replace(records=stated), last], tar)
    assert found is not None
    assert found.field == field
    assert "'w'" not in str(found)


def test_what_does_not_show_may_differ() -> None:
    """Owner names, type bits of the mode, ./ and slashes, the size of a directory, a symlink's mode, other records."""
    members = [
        Member(b"./d/", "dir", uname=b"u"),
        Member(b"./d/f", "reg", others=((b"comment", b"c"),)),
        Member(b"d/h", "hardlink", link=b"./d/f"),
        Member(b"d/s", "symlink", link=b"f"),
    ]
    tar = b"".join(map(encode, members)) + bytes(1024)
    table = entries_of(tar)
    folder, file, link, symbolic = table
    others = [
        folder._replace(name=b"d", uname=b"", gname=b"g", size=7, mode=folder.mode | 0o40000, linkname=b"l"),
        file._replace(name=b"/d/f", records=(), devmajor=3),
        link._replace(linkname=b"/d/f", size=9),
        symbolic._replace(mode=0),
    ]
    assert [a != b for a, b in zip(table, others, strict=True)] == [True] * 4
    assert difference(others, tar) is None


def test_entries_missing_and_invented_are_found() -> None:
    """An entry the table leaves out (first, middle, last) or has where the tar has none."""
    tar = plain()
    table = entries_of(tar)
    for gone in range(3):
        assert difference([*table[:gone], *table[gone + 1 :]], tar) is not None
    invented = table[2]._replace(name=b"new", offset=table[2].offset + 512)
    found = difference([*table, invented], tar)
    assert found is not None
    assert found.name == b"new"


def test_a_header_that_cannot_be_read_is_a_difference() -> None:
    """A broken checksum, a type that no table describes, a sparse file: named with the entry they should be."""
    tar = bytearray(plain())
    table = entries_of(bytes(tar))
    at = table[1].offset - 512
    for place, value in ((at, b"?"), (at + 156, b"g")):
        broken = bytes(tar[:place] + value + tar[place + 1 :])
        found = difference(table, broken)
        assert found is not None
        assert (found.name, found.field) == (b"usr/f", "header")
    sparse = plain(others=((b"GNU.sparse.major", b"1"),))
    header = read_headers(0, [sparse])
    lie = [header.entries[0], table[1]._replace(offset=header.entries[0].offset + 2048 + 512)]
    found = compare(lie, header, Clock())
    assert found is not None
    assert "sparse" in found.found


def test_sparse_entries_are_refused_before() -> None:
    """A table that says so itself makes no tree, so nothing of it is ever mounted."""
    (_, entry, _) = entries_of(plain())
    with pytest.raises(Unsupported):
        build_tree([entry._replace(records=((b"GNU.sparse.major", b"1"),))])


def outlines(table: list[Entry]) -> list[Outline]:
    """The same table, as it is stored."""
    raw = ztoc_writer.encode(small_ztoc(*table, uncompressed_size=1 << 40))
    contents = ztoc.locate_contents(raw)
    return contents.outlines(contents.reader(raw), 0, len(table))


@given(tars(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_glance_sees_no_more_than_a_closer_look(tar: bytes, data: st.DataObject) -> None:
    """What passes at a glance passes the whole comparison, in honest tables and with any field of any entry changed."""
    table = entries_of(tar)
    if not table:
        return
    assert [tuple(row[:1]) for row in outlines(table)] == [(entry.name,) for entry in table]
    number = data.draw(st.integers(0, len(table) - 1))
    field = data.draw(st.sampled_from(["name", "type", "size", "linkname", "mode", "uid", "gid", "mod_time"]))
    other = data.draw(st.sampled_from(entries_of(plain(mtime=5)) + table))
    changed = table[number]._replace(**{field: getattr(other, field)})
    if changed.type == "reg" and changed.size > 1000 + table[number].size:
        return  # the next one would begin inside it, which no decoder lets through
    table[number] = changed
    end = max(entry.offset for entry in table)
    starts = [0] + [after(entry.offset, entry.size, has_data=entry.type == "reg") for entry in table]
    if any(start + 512 > entry.offset for start, entry in zip(starts, table, strict=False)):
        return
    rest = unlike(outlines(table), 0, tar + bytes(1024), 0)
    for one in set(range(len(table))) - set(rest):
        region = tar[starts[one] : table[one].offset]
        assert compare([table[one]], read_headers(starts[one], [region]), Clock()) is None, end


def test_a_glance_is_enough_for_what_layers_are_made_of() -> None:
    """Files, directories and links as GNU tar and Go write them, long ustar names too: nothing needs a closer look."""
    kinds = (("reg", b"", b"x" * 700), ("dir", b"", b""), ("symlink", b"to", b""), ("hardlink", b"f0", b""))
    for style in ("gnu", "ustar", "pax"):
        members = [
            Member(b"f%d" % n + b"/" * (kind == "dir"), kind, link=link, content=content, style=style, uid=n)
            for n, (kind, link, content) in enumerate(kinds)
        ]
        if style != "gnu":
            members.append(Member(b"d" * 90 + b"/" + b"n" * 60, "reg", style=style))
        tar = b"".join(map(encode, members)) + bytes(1024)
        assert unlike(outlines(entries_of(tar)), 0, tar, 0) == [], style


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_glance_at_samples(case: Case) -> None:
    """What the Go tool's tables make anyone look at closer is what has records, or is odd: few."""
    raw = case.ztoc
    contents = ztoc.locate_contents(raw)
    rows = contents.outlines(contents.reader(raw), 0, contents.count)
    rest = unlike(rows, 0, case.tar, 0)
    usual = [
        n
        for n, row in enumerate(rows)
        if not row.records and row.type in (b"reg", b"dir") and len(row.name) < 99
    ]
    assert len(set(rest) & set(usual)) <= len(usual) // 20


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_a_difference_is_one_short_line(name: bytes, link: bytes) -> None:
    """Whatever bytes a name or a link has: printable ASCII, bounded."""
    entry = entries_of(plain())[1]._replace(name=name, type="symlink", linkname=link)
    headers = read_headers(0, [b""])._replace(entries=[entry._replace(linkname=link + b"\n")])
    text = str(compare([entry], headers, Clock()))
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 500


@given(st.binary(min_size=512, max_size=3000))
@settings(max_examples=200)
def test_any_bytes_give_an_answer(junk: bytes) -> None:
    """Random blocks where headers should be: an answer, never another error than ours."""
    try:
        headers = read_headers(0, [junk])
    except SociError:
        pytest.fail("errors are answers here")
    assert compare(entries_of(plain())[:1], headers, Clock()) is not None or headers.entries
