"""Digests and image references."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference

HEX = "0123456789abcdef" * 4


@given(st.binary(max_size=200))
def test_sha256_matches_its_data_only(data: bytes) -> None:
    """A digest of data parses back to itself and matches that data and no longer one."""
    found = digests.sha256(data)
    assert digests.parse(str(found)) == found
    assert found.hex == hashlib.sha256(data).hexdigest()
    assert found.matches(data)
    assert not found.matches(data + b"x")


@pytest.mark.parametrize(
    "text", ["", HEX, "sha256:", f"sha256:{HEX[:-1]}", f"sha256:{HEX.upper()}", f"md5:{HEX}"]
)
def test_bad_digests_are_refused(text: str) -> None:
    """No algorithm, a wrong length, upper case or an unknown algorithm: Invalid."""
    with pytest.raises(Invalid):
        digests.parse(text)


@pytest.mark.parametrize(
    ("text", "canonical", "host"),
    [
        ("nginx", "docker.io/library/nginx:latest", "registry-1.docker.io"),
        ("nginx:1.27", "docker.io/library/nginx:1.27", "registry-1.docker.io"),
        ("team/app", "docker.io/team/app:latest", "registry-1.docker.io"),
        ("index.docker.io/nginx", "docker.io/library/nginx:latest", "registry-1.docker.io"),
        ("localhost/x", "localhost/x:latest", "localhost"),
        ("localhost:5000/x:1", "localhost:5000/x:1", "localhost:5000"),
        ("r.example.com/a/b", "r.example.com/a/b:latest", "r.example.com"),
        (f"nginx@sha256:{HEX}", f"docker.io/library/nginx@sha256:{HEX}", "registry-1.docker.io"),
        (f"nginx:1@sha256:{HEX}", f"docker.io/library/nginx:1@sha256:{HEX}", "registry-1.docker.io"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000"),
    ],
)
def test_references_are_normalized_as_docker_does(text: str, canonical: str, host: str) -> None:
    """Default domain, library/, tag and digest as Docker fills them in; the result parses to itself."""
    found = reference.parse(text)
    assert (str(found), found.host) == (canonical, host)
    assert reference.parse(canonical) == found


@pytest.mark.parametrize(
    "text", ["", "a/UPPER", "a//b", "x:", "x@sha256:1", "a b", HEX, "x/" * 200 + "y", "-x"]
)
def test_bad_references_are_refused(text: str) -> None:
    """What Docker refuses: Invalid."""
    with pytest.raises(Invalid):
        reference.parse(text)


COMPONENT = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,5})?", fullmatch=True)


@given(
    st.lists(COMPONENT, min_size=1, max_size=4),
    st.from_regex(r"\w[\w.-]{0,20}", fullmatch=True).filter(str.isascii),
)
def test_references_round_trip(path: list[str], tag: str) -> None:
    """Any name on any host with any tag is its own normal form."""
    text = f"r.example.com:5000/{'/'.join(path)}:{tag}"
    assert str(reference.parse(text)) == text
