"""containerd's filter syntax."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import snapfilter

FIELDS = {
    ("name",): "foo",
    ("parent",): "",
    ("kind",): "active",
    ("labels", "a"): "1",
    ("labels", "containerd.io/snapshot.ref"): "sha256:00",
}


def match(*filters: str) -> bool:
    return snapfilter.parse(filters).matches(FIELDS.get)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], True),
        ([""], True),
        (["name==foo"], True),
        (["name==bar"], False),
        (["name==bar", "name==foo"], True),
        (["name==foo,kind==view"], False),
        (["name==foo, kind==active"], True),
        ([" name == foo"], True),
        (["labels.a"], True),
        (["labels.b"], False),
        (["labels.b==x"], False),
        (["labels.b!=x"], True),
        (['parent!=""'], False),
        (['parent==""'], True),
        (['labels."containerd.io/snapshot.ref"==sha256:00,parent==""'], True),
        (["name~=^f"], True),
        (["name~=/o{2}$/"], True),
        (["name~=|x|"], False),
        (["labels.b~=^$"], True),
        ([r'name=="\x66\157\u006f"'], True),
    ],
)
def test_matching(filters: list[str], expected: bool) -> None:
    """Each form of the grammar matches what it matches in containerd."""
    assert match(*filters) is expected


@pytest.mark.parametrize(
    "text",
    [
        "name=",
        "name==",
        "name=foo",
        "name!==foo",
        "name==foo ",
        "name==foo,",
        ",name==foo",
        "name .x==foo",
        "name=='foo'x y",
        "name==/foo/",
        'name=="foo',
        'name=="fo\no"',
        r'name=="\q"',
        r'name=="\777"',
        r'name=="\ud800"',
        "name== ==",
        "-",
        "name~=(",
        "name~=" + "a" * 5000,
        "name==" + "a" * 70000,
    ],
)
def test_errors(text: str) -> None:
    """What containerd's parser refuses is Invalid; so are regular expressions that cannot be used."""
    with pytest.raises(Invalid, match="filter"):
        snapfilter.parse([text])


def quoted(text: str) -> str:
    return (
        '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\0", "\\x00") + '"'
    )


@given(st.lists(st.text(), min_size=1, max_size=3), st.text())
def test_quoting_carries_any_text(path: list[str], value: str) -> None:
    """Any field path and value survive being written with quotes and escapes."""
    text = ".".join(quoted(part) for part in path) + "==" + quoted(value)
    parsed = snapfilter.parse([text])
    assert parsed.alternatives == ((snapfilter.Selector(tuple(path), "==", value),),)
    assert parsed.matches(lambda asked: value if asked == tuple(path) else None)


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_invalid(text: str) -> None:
    """No text makes the parser fail in another way than Invalid."""
    try:
        parsed = snapfilter.parse([text])
    except Invalid:
        return
    assert parsed.matches(FIELDS.get) in {True, False}


def test_required() -> None:
    """A value is required only when every alternative demands it."""
    ref = ("labels", "r")
    assert snapfilter.parse(["labels.r==x,kind==view", "labels.r==x"]).required(ref) == "x"
    assert snapfilter.parse(["labels.r==x", "labels.r==y"]).required(ref) is None
    assert snapfilter.parse(["labels.r==x", "kind==view"]).required(ref) is None
    assert snapfilter.parse(["labels.r!=x"]).required(ref) is None
    assert snapfilter.parse([]).required(ref) is None
