"""From paths to spans: exact, by layer, with a warning for each path that cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.prefetch_support import entry, layer
from tests.unit.ztoc_support import Case, cases, read_range

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import ztoc as ztocs
from soci_snapshotter.formats.prefetch import SpanRange
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.policy.prefetchset import LayerContents, PrefetchPlan, Wanted, merged, plan, shown

if TYPE_CHECKING:
    from soci_snapshotter.formats.toc import Entry


def wanted(*paths: str) -> list[Wanted]:
    return [Wanted(path.encode()) for path in paths]


def listed(result: PrefetchPlan, of: LayerContents) -> dict[int, int]:
    """Span to priority, for one layer."""
    return {
        span: priority
        for start, end, priority in result.spans.get(of.digest, ())
        for span in range(start, end + 1)
    }


FILES = st.lists(st.tuples(st.integers(0, 4000), st.integers(-1, 2)), min_size=1, max_size=12)


@given(FILES, FILES)
def test_spans_are_exact(lower: list[tuple[int, int]], upper: list[tuple[int, int]]) -> None:
    """Each byte of a wanted file is in a listed span at its priority or a more urgent one, and no listed span
    lacks a byte of a file wanted at just its priority. (Priority -1 here: not wanted.)
    """
    stack = [(0, lower), (1, upper)]
    layers = [
        layer(n, *[entry(f"{n}-{i}", size=size) for i, (size, _) in enumerate(files)]) for n, files in stack
    ]
    asked = [
        Wanted(f"/{n}-{i}".encode(), priority)
        for n, files in stack
        for i, (_, priority) in enumerate(files)
        if priority >= 0
    ]
    result = plan(layers, asked)
    assert result.warnings == ()
    for contents, (_, files) in zip(layers, stack, strict=True):
        needed: dict[int, int] = {}
        assert contents.entries is not None and contents.spans is not None
        for item, (size, priority) in zip(contents.entries, files, strict=True):
            for byte in range(item.offset, item.offset + size) if priority >= 0 else ():
                span = contents.spans.span_at(byte)
                needed[span] = min(priority, needed.get(span, priority))
        assert listed(result, contents) == needed


@pytest.mark.parametrize(
    "case", [case for case in cases() if "empty" not in case.name], ids=lambda case: case.name
)
def test_the_go_tools_ztocs(case: Case) -> None:
    """With nothing but the spans listed for a file of a vector, all of the file is read; a span less and it
    is not.
    """
    data = case.ztoc
    ztoc = ztocs.decode(data)
    spans = span_table(ztoc)
    contents = LayerContents(digests.sha256(case.layer), ztoc.entries, spans)
    tree = merged([contents])
    tar, seen = case.tar, 0
    for found in tree.walk():
        if not found.is_regular or found.entry is None or not found.entry.size:
            continue
        seen += 1
        item = found.entry
        (only,) = plan([contents], [Wanted(found.path)], tree).spans[contents.digest]
        start, end = spans.uncompressed_range(only.start)[0], spans.uncompressed_range(only.end)[1]
        assert start <= item.offset < spans.uncompressed_range(only.start)[1]
        assert spans.uncompressed_range(only.end)[0] < item.offset + item.size <= end
        if seen < 20:
            assert read_range(spans, start, end - start, case.layer, data) == tar[start:end]
    assert seen


def test_the_topmost_layer_has_the_spans_and_links_are_followed() -> None:
    """A path through links of another layer reaches the data's own layer; the hidden file costs nothing."""
    low = layer(1, entry("usr/bin/sh", size=5000), entry("bin", "symlink", link="usr/bin"))
    top = layer(
        2, entry("pad", size=3000), entry("data", size=10), entry("usr/bin/sh", "hardlink", link="data")
    )
    result = plan([low, top], wanted("./bin/sh"))
    assert dict(result.spans) == {top.digest: (SpanRange(2, 2),)}
    assert (result.files, result.size, result.warnings) == (1, 10, ())


def test_a_directory_means_all_under_it_but_not_what_its_links_lead_to() -> None:
    """Files of all layers under it, hidden ones excepted; a link in it to elsewhere is not followed."""
    low = layer(1, entry("app/a", size=1), entry("app/gone", size=5000), entry("big", size=9000))
    top = layer(
        2, entry("app/.wh.gone"), entry("app/sub/b", size=1), entry("app/out", "symlink", link="../big")
    )
    result = plan([low, top], wanted("/app/"))
    assert dict(result.spans) == {low.digest: (SpanRange(0, 0),), top.digest: (SpanRange(0, 0),)}
    assert result.files == 2


def test_globs_and_literal_names_with_brackets() -> None:
    """A pattern means its matches, directories with all under them; a file named like a pattern comes first."""
    only = layer(1, entry("r/[id].js", size=4000), entry("r/i.js", size=1), entry("r/d.d/deep", size=1500))
    assert plan([only], wanted("/r/[id].js")).files == 1
    assert listed(plan([only], wanted("/r/[id].js")), only) == {0: 0, 1: 0, 2: 0}
    assert listed(plan([only], wanted("/r/[i].js")), only) == {2: 0}
    assert plan([only], wanted("/r/*.d")).files == 1
    assert plan([only], wanted("**/*.js", "/r/**")).files == 3


def test_empty_files_and_what_has_no_data_need_no_span() -> None:
    """No artifact and no warning for an empty file, a device, an empty directory."""
    only = layer(1, entry("empty"), entry("fifo", "fifo", size=3), entry("d/", "dir"), entry("x", size=4))
    result = plan([only], wanted("empty", "fifo", "d"))
    assert dict(result.spans) == {}
    assert result.warnings == ()


def test_priorities_are_kept_and_the_most_urgent_wins() -> None:
    """Two files in one span: the span goes with the lower number; others keep theirs."""
    only = layer(1, entry("a", size=100), entry("b", size=3000), entry("c", size=100))
    result = plan([only], [Wanted(b"b", 5), Wanted(b"a", 1), Wanted(b"c", 5)])
    assert result.spans[only.digest] == (SpanRange(0, 0, 1), SpanRange(1, 2, 5))


def test_a_layer_that_the_image_repeats_has_one_list() -> None:
    """The same layer twice: spans by digest, of its topmost place."""
    one, other = layer(1, entry("a", size=10)), layer(2, entry("a", size=10))
    result = plan([one, other, one], wanted("a"))
    assert dict(result.spans) == {one.digest: (SpanRange(0, 0),)}


@pytest.mark.parametrize(
    ("path", "warning"),
    [
        ("/none", "/none: in no layer"),
        ("./none/", "/none: in no layer"),
        ("/to-none", "/to-none: leads to /usr/none, in no layer"),
        ("/loop", "/loop: a loop of symbolic links, or more than 40 of them"),
        ("/*.rs", "/*.rs: matches nothing, in no layer"),
        (
            "/small",
            "/small: not prefetched, in layer sha256:" + "2".zfill(64) + ", which has no ztoc: /small",
        ),
        (
            "/s*",
            "/s*: not prefetched, in layer sha256:"
            + "2".zfill(64)
            + ", which has no ztoc: /small and 1 more",
        ),
    ],
)
def test_what_cannot_be_had_is_a_warning(path: str, warning: str) -> None:
    """One line that names the path; the other paths are planned all the same."""
    low = layer(
        1,
        entry("there", size=9),
        entry("to-none", "symlink", link="usr/none"),
        entry("loop", "symlink", link="loop"),
    )
    small = layer(2, entry("small", size=1), entry("small2", size=1), ztoc=False)
    result = plan([low, small], wanted(path, "there", path))
    assert result.warnings == (warning,)
    assert list(result.spans) == [low.digest]


def test_layers_that_nobody_read_are_owned_up_to() -> None:
    """When a layer's contents are unknown, `in no layer` would be a lie."""
    result = plan([layer(1, entry("a")), layer(2, entry("b"), ztoc=False, known=False)], wanted("b"))
    assert result.warnings == ("/b: in no layer whose contents are known (1 have no ztoc)",)


@pytest.mark.parametrize(
    ("path", "text"),
    [(b"./a//b/", "/a/b"), (b"caf\xe9\n", "/caf\\xe9\\n"), (b"", "/"), (b"x" * 999, "/" + "x" * 199)],
)
def test_paths_are_shown_on_one_line(path: bytes, text: str) -> None:
    """What a warning shows is absolute, printable and short."""
    assert shown(path) == text


def test_a_hundred_thousand_entries_are_walked() -> None:
    """A whole large image: every file is found, and its spans are one range."""
    entries: list[Entry] = [entry(f"d{i % 100}/s{i % 1000}/f{i}", size=100 + i % 7) for i in range(100_000)]
    only = layer(1, *entries)
    result = plan([only], wanted("/"))
    assert result.files == 100_000
    assert only.spans is not None
    needed = {
        only.spans.span_at(byte)
        for item in only.entries or ()
        for byte in (item.offset, item.offset + item.size - 1)
    }
    assert listed(result, only).keys() == needed
