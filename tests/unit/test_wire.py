"""What a dump shows: facts for whoever debugs a registry, and never a secret, wherever one is planted."""

from __future__ import annotations

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.registry.wire import Wire, shown_field, shown_url

MARK = "MARKED-s3cret"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", f"Bearer {MARK}"),
        ("Proxy-Authorization", f"Basic {MARK}"),
        ("Cookie", f"session={MARK}"),
        ("Set-Cookie", f"session={MARK}; HttpOnly"),
        ("X-Amz-Security-Token", MARK),
        ("X-Registry-Auth", MARK),
        ("x-of-hosts-toml", MARK),
        ("Location", f"https://s3.test/blob?X-Amz-Signature={MARK}&X-Amz-Credential={MARK}"),
        ("Location", f"/v2/r/blobs/uploads/u?_state={MARK}"),
        ("Location", f"https://user:{MARK}@s3.test/blob"),
        ("Location", f"https://s3.test/blob#{MARK}"),
        ("Location", f"https://s3.test/blob?{MARK}"),
        ("Link", f'</v2/r/tags/list?n=5&token={MARK}>; rel="next"'),
        ("Link", f'<https://r.test/v2/x?sig={MARK}>; rel="next"'),
        ("WWW-Authenticate", f'Bearer realm="https://auth.test/token?session={MARK}",service="s"'),
    ],
)
def test_secrets_in_fields_are_left_out(name: str, value: str) -> None:
    """Credentials, cookies, added fields, signed and stateful queries, user names in URLs."""
    assert MARK not in shown_field(name, value)


def test_what_helps_is_shown() -> None:
    """Digests, scopes, ranges, the path of an upload and the realm stay readable."""
    assert shown_url("https://r.test/v2/x/blobs/uploads/?mount=sha256:ab&from=y&ns=docker.io") == (
        "https://r.test/v2/x/blobs/uploads/?mount=sha256:ab&from=y&ns=docker.io"
    )
    challenge = 'Bearer realm="https://auth.test/token",service="s",scope="repository:x:pull"'
    assert shown_field("WWW-Authenticate", challenge) == challenge
    assert (
        shown_field("location", "/v2/x/blobs/uploads/u1?_state=zzz")
        == "/v2/x/blobs/uploads/u1?_state=(hidden)"
    )


@given(st.text(max_size=300), st.sampled_from(["Location", "Link", "WWW-Authenticate", "Server"]))
def test_hostile_values_stay_on_their_line(value: str, name: str) -> None:
    """Control characters and anything a terminal might obey are replaced; nothing raises."""
    assert all(32 <= ord(letter) < 127 for letter in shown_field(name, value))


def test_the_lines_of_a_head() -> None:
    """A request and its answer: marks for the direction, names of hidden fields, an error's reason without a URL."""
    lines: list[str] = []
    wire = Wire(lines.append, None)
    started = wire.sending("GET", f"https://r.test/x?sig={MARK}", {"Accept": "a/b", "Authorization": MARK})
    answer = urllib3.HTTPResponse(body=b"", status=404, reason="Not\x1b[31m Found", headers={"Date": "now"})
    wire.answered("GET", "https://r.test/x", answer, started)
    assert lines == [
        "> GET https://r.test/x?sig=(hidden)",
        "> Accept: a/b",
        "> Authorization: (hidden)",
        "< 404 Not?[31m Found",
        "< Date: now",
    ]
    wire.failed("GET", f"https://r.test/x?sig={MARK}", ConnectionResetError(104, f"reset {MARK}"), started)
    assert MARK not in "\n".join(lines)
    assert lines[-1].startswith("GET https://r.test/x?sig=(hidden): ")
