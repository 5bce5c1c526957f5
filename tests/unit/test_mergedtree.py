"""The tree of all layers: overlayfs's rules, symbolic links, globs."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.prefetch_support import entry, laid_out

from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.policy import mergedtree
from soci_snapshotter.policy.mergedtree import Found, Lost, MergedTree

Layers: TypeAlias = list[list[Entry]]


def tree(*layers: list[Entry]) -> MergedTree:
    return MergedTree([laid_out(layer) for layer in layers])


def names(found: list[Found]) -> list[str]:
    return sorted(item.path.decode() for item in found)


def where(merged: MergedTree, path: str) -> tuple[str, int] | None:
    """Real path and layer."""
    found = merged.lookup(path.encode())
    return None if found is None else (found.path.decode(), found.layer)


def test_the_topmost_layer_wins_and_the_last_entry_within_a_layer() -> None:
    """Of two layers the upper has the file; of two entries of one layer the later."""
    merged = tree([entry("a", size=1), entry("b")], [entry("./a", size=2), entry("/a", size=3)])
    found = merged.lookup(b"a")
    assert found is not None and found.entry is not None
    assert (found.layer, found.entry.size) == (1, 3)
    assert where(merged, "b") == ("b", 0)


@pytest.mark.parametrize(
    "spelled", ["usr/bin/x", "./usr/bin/x", "/usr/bin/x", "usr//bin/./x", "usr/y/../bin/x"]
)
def test_spellings_of_a_name_are_one(spelled: str) -> None:
    """However tar or user spell a path, it is the same."""
    assert where(tree([entry(spelled)]), "/usr/bin/x") == ("usr/bin/x", 0)
    merged = tree([entry("usr/bin/x"), entry("usr/y/", "dir")])
    assert where(merged, spelled) == ("usr/bin/x", 0)


def test_whiteouts_hide_what_is_below_their_layer_only() -> None:
    """A whiteout hides a lower layer's tree, not what its own layer or an upper one puts there."""
    lower = [entry("d/", "dir"), entry("d/x"), entry("e/x"), entry("f")]
    upper = [entry("d/new"), entry(".wh.d"), entry("e/.wh.x"), entry(".wh.f"), entry(".wh.never")]
    merged = tree(lower, upper, [entry("f")])
    assert where(merged, "d/x") is None
    assert where(merged, "d/new") == ("d/new", 1)
    assert where(merged, "e/x") is None
    assert where(merged, "e") == ("e", -1)
    assert where(merged, "f") == ("f", 2)


def test_opaque_directories_hide_what_is_below() -> None:
    """An opaque directory keeps its own layer's files, wherever the marker stands among them."""
    merged = tree([entry("d/x"), entry("d/sub/y")], [entry("d/a"), entry("d/.wh..wh..opq"), entry("d/b")])
    assert names(list(merged.walk(b"d"))) == ["d/a", "d/b"]


def test_overlayfs_own_whiteouts_hide_too() -> None:
    """A character device 0:0 in a lower directory is a whiteout to overlayfs; other devices are files."""
    merged = tree([entry("x"), entry("y")], [entry("x", "char"), entry("y", "char")._replace(devminor=3)])
    assert where(merged, "x") is None
    assert where(merged, "y") == ("y", 1)


def test_a_directory_replaces_and_is_replaced() -> None:
    """A file over a directory hides its tree; a directory over a link or a file of a lower layer hides that."""
    lower = [entry("d/x"), entry("bin", "symlink", link="usr/bin"), entry("usr/bin/sh"), entry("f")]
    merged = tree(lower, [entry("d"), entry("bin/own"), entry("f/g")])
    assert where(merged, "d/x") is None
    assert where(merged, "d") == ("d", 1)
    assert where(merged, "bin/sh") is None
    assert where(merged, "bin/own") == ("bin/own", 1)
    assert where(merged, "f/g") == ("f/g", 1)


def test_a_directory_replaced_within_a_layer_is_not_filled_any_more() -> None:
    """A name remembered from before the replacement does not bring the old directory back."""
    merged = tree([entry("d/x"), entry("d"), entry("d/y"), entry("d/z")])
    assert names(list(merged.walk())) == ["d/y", "d/z"]


def test_hard_links_are_their_targets_data_at_that_moment() -> None:
    """A link keeps the entry its target had when it was made; a target in another layer is none."""
    merged = tree(
        [entry("low", size=9)],
        [
            entry("t", size=1),
            entry("l", "hardlink", link="./t"),
            entry("t", size=2),
            entry("l2", "hardlink", link="l"),
            entry("bad", "hardlink", link="low"),
            entry("self", "hardlink", link="self"),
        ],
    )
    for name in (b"l", b"l2"):
        found = merged.lookup(name)
        assert found is not None and found.entry is not None
        assert (found.entry.name, found.entry.size) == (b"t", 1)
    assert merged.lookup(b"bad") is None
    assert merged.lookup(b"self") is None


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("/bin/sh", "usr/bin/dash"),
        ("lib64/ld.so", "usr/lib/ld.so"),
        ("/../../bin/../bin/sh", "usr/bin/dash"),
        ("/abs", "usr/bin/dash"),
        ("/escape", "usr/bin/dash"),
        ("/usr/bin/up", "usr/lib"),
        ("/usr/bin/up/ld.so", "usr/lib/ld.so"),
        ("/chain/sh", "usr/bin/dash"),
        ("", ""),
        ("..", ""),
        ("/bin/sh/", "usr/bin/dash"),
    ],
)
def test_links_are_followed_across_layers(path: str, real: str) -> None:
    """Absolute and relative targets, links to directories on the way, `..` never above the root."""
    merged = tree(
        [entry("usr/lib/ld.so"), entry("usr/bin/dash"), entry("bin", "symlink", link="usr/bin")],
        [
            entry("usr/bin/sh", "symlink", link="dash"),
            entry("lib64", "symlink", link="usr/lib"),
            entry("abs", "symlink", link="/bin/sh"),
            entry("escape", "symlink", link="../../../bin/dash"),
            entry("usr/bin/up", "symlink", link="../lib"),
            entry("chain", "symlink", link="./bin/."),
        ],
    )
    found = merged.resolve(path.encode())
    assert isinstance(found, Found)
    assert found.path.decode() == real


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("nothing", Lost(b"nothing")),
        ("file/below", Lost(b"file/below")),
        ("file/.", Lost(b"file/.")),
        ("dangling", Lost(b"usr/none")),
        ("dangling/a//./b/", Lost(b"usr/none/a/./b")),
        ("loop", Lost(b"", loop=True)),
        ("loop/x", Lost(b"", loop=True)),
        ("a", Lost(b"", loop=True)),
        ("long", Lost(b"long")),
        ("empty", Lost(b"empty")),
    ],
)
def test_what_leads_nowhere_says_where_it_ended(path: str, lost: Lost) -> None:
    """The missing path is named, links followed; loops end."""
    merged = tree(
        [
            entry("file"),
            entry("usr/", "dir"),
            entry("dangling", "symlink", link="/usr/none"),
            entry("loop", "symlink", link="loop"),
            entry("a", "symlink", link="b/../b"),
            entry("b", "symlink", link="a"),
            entry("long", "symlink", link="x/" * 2048),
            entry("empty", "symlink"),
        ]
    )
    assert merged.resolve(path.encode()) == lost
    assert merged.lookup(path.encode()) is None


GLOBBED = [
    entry("app/main.py"),
    entry("app/.env"),
    entry("app/lib/a.so"),
    entry("app/lib/deep/b.so"),
    entry("app/[id].js"),
    entry("bin", "symlink", link="usr/bin"),
    entry("usr/bin/python3"),
    entry("usr/bin/pydoc"),
    entry("usr/bin/perl"),
    entry("usr/bin/py", "symlink", link="python3"),
    entry("usr/bin/pygone", "symlink", link="gone"),
    entry("usr/loop", "symlink", link="."),
]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("/app/*", ["app/.env", "app/[id].js", "app/lib", "app/main.py"]),
        ("./app/*.p?", ["app/main.py"]),
        ("/bin/py*", ["usr/bin/pydoc", "usr/bin/python3"]),
        ("/*/p[f-y]r[!a]", []),
        ("/b*/p[a-f]r[!a]", ["usr/bin/perl"]),
        ("/b*/p[a-f]r[^a]", ["usr/bin/perl"]),
        ("/**/*.so", ["app/lib/a.so", "app/lib/deep/b.so"]),
        ("app/**/*.so", ["app/lib/a.so", "app/lib/deep/b.so"]),
        ("app/**/**/lib/**/b.so", ["app/lib/deep/b.so"]),
        ("app/**", ["app"]),
        ("app/main.py/**", []),
        ("**/python3/**", []),
        ("**", [""]),
        ("app/[[]id].js", ["app/[id].js"]),
        ("app/*/../*.py", ["app/main.py"]),
        ("*/nothing*", []),
    ],
)
def test_globs(pattern: str, matches: list[str]) -> None:
    """Names by pattern, links followed, each match once; `**` crosses directories but no links."""
    assert names(tree(GLOBBED).glob(pattern.encode())) == matches


def test_names_too_long_and_floods_of_directories_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile layer costs its own files, not the memory."""
    monkeypatch.setattr(mergedtree, "MAX_IMPLICIT", 5)
    merged = tree([entry("ok"), entry("x/" * 3000 + "f"), entry("a/b/c/d/f"), entry("p/q/r/f"), entry("a/f")])
    assert names(list(merged.walk())) == ["a/b/c/d/f", "a/f", "ok"]


NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join)
KINDS = st.sampled_from(["reg", "dir", "whiteout", "opaque"])
STACKS = st.lists(st.lists(st.tuples(NAMES, KINDS), max_size=6), min_size=1, max_size=4)


def to_entry(name: str, kind: str) -> Entry:
    head, _, base = name.rpartition("/")
    if kind == "whiteout":
        return entry(f"{head}/.wh.{base}" if head else f".wh.{base}")
    if kind == "opaque":
        return entry(f"{name}/.wh..wh..opq")
    return entry(name, kind)


def model(stack: list[list[tuple[str, str]]]) -> dict[str, int]:
    """Files and their layers, by paths alone."""
    files: dict[str, int] = {}
    for number, members in enumerate(stack):

        def under(path: str, top: str) -> bool:
            return path == top or path.startswith(top + "/")

        hidden = [name for name, kind in members if kind == "whiteout"]
        opaque = [name for name, kind in members if kind == "opaque"]
        files = {
            path: n
            for path, n in files.items()
            if not any(under(path, top) for top in hidden)
            and not any(path.startswith(top + "/") for top in opaque)
        }
        for name, kind in members:
            # What is a directory now cannot be a file any more; what is a file has nothing under it.
            made = name if kind in ("dir", "opaque") else name.rpartition("/")[0]
            parents = {made[:i] for i in range(1, len(made) + 1) if made[i:][:1] in ("", "/")}
            files = {path: n for path, n in files.items() if path not in parents}
            if kind == "reg":
                files = {path: n for path, n in files.items() if not under(path, name)}
                files[name] = number
    return files


@given(STACKS)
def test_layers_merge_as_a_model_by_paths_says(stack: list[list[tuple[str, str]]]) -> None:
    """Random files, directories, whiteouts and opaque directories: the same files of the same layers."""
    merged = tree(*[[to_entry(name, kind) for name, kind in members] for members in stack])
    expected = model(stack)
    assert {found.path.decode(): found.layer for found in merged.walk()} == expected
    for path, number in expected.items():
        assert where(merged, "/" + path) == (path, number)
