"""hosts.toml and certificate directories: what containerd reads from them, and only Config for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Config
from soci_snapshotter.formats import hosts
from soci_snapshotter.formats.hosts import Capability, Endpoint, Tls, mirror
from soci_snapshotter.registry.certsd import CertsDirectories

HUB = Endpoint("https", "registry-1.docker.io")
OWN = Endpoint("https", "own.test:5000", tls=Tls(("/flag/ca",), (("/flag/c", "/flag/k"),)))
FULL = b"""
server = "https://upstream.test"
capabilities = ["pull", "push"]
unknown = { a = 1 }

[host."http://one.test:80/base"]
  capabilities = ["Pull"]
  ca = "one.pem"
  client = "both.pem"
  skip_verify = true
  dial_timeout = "1m0.5s"
  [host."http://one.test:80/base".header]
    x-a = "1"
    x-b = ["2", "3"]

[host."two.test"]
  ca = ["/abs.pem", "rel.pem"]
  client = [["c.pem", "k.pem"], ["both.pem", ""]]
  override_path = true
  future_key = "tolerated"

[host."https://three.test/odd/"]
  override_path = true
"""


def test_every_key_is_read_in_the_order_of_the_file() -> None:
    """Three mirrors and the server, with paths relative to the file, URL forms, headers and defaults."""
    one, two, three, server = hosts.parse(FULL, "/certs.d/docker.io", HUB)
    assert (one.scheme, one.host, one.path) == ("http", "one.test:80", "/base/v2")
    assert one.capabilities == {Capability.PULL}
    assert one.tls == Tls(
        ("/certs.d/docker.io/one.pem",), (("/certs.d/docker.io/both.pem", ""),), skip_verify=True
    )
    assert one.headers == (("x-a", "1"), ("x-b", "2, 3"))
    assert one.dial_timeout == 60.5
    assert (two.scheme, two.host, two.path) == ("https", "two.test", "")
    assert two.tls.ca == ("/abs.pem", "/certs.d/docker.io/rel.pem")
    assert two.tls.client == (
        ("/certs.d/docker.io/c.pem", "/certs.d/docker.io/k.pem"),
        ("/certs.d/docker.io/both.pem", ""),
    )
    assert two.capabilities == set(Capability)
    assert three.path == "/odd"
    assert (server.host, server.path) == ("upstream.test", "/v2")
    assert server.capabilities == {Capability.PULL, Capability.PUSH}
    assert [each.namespace for each in (one, two, three, server)] == ["docker.io"] * 4


def test_the_registry_itself_comes_last_without_a_server() -> None:
    """No `server`: the registry, with the caller's TLS settings; a mirror gets the CA but not the client certificate."""
    mirror, own = hosts.parse(b'[host."https://m.test"]', "/d", OWN)
    assert own == OWN
    assert mirror.tls == Tls(("/flag/ca",))
    assert mirror.namespace == "own.test:5000"


def test_header_values_are_in_no_repr() -> None:
    """A header of hosts.toml may be a secret."""
    (own,) = hosts.parse(b'[header]\nx-token = "MARK"\n', "/d", OWN)
    assert own.headers == (("x-token", "MARK"),)
    assert "MARK" not in repr(own)


def test_directory_names() -> None:
    """containerd's order: the port between underscores, the host, _default; Docker Hub by the name in references."""
    assert hosts.directories("r.test:5000") == ("r.test_5000_", "r.test:5000", "_default")
    assert hosts.directories("registry-1.docker.io") == ("docker.io", "_default")


def test_certificate_files() -> None:
    """*.crt is a CA, *.cert with *.key a client pair, a .cert alone holds both; other files are none of it."""
    found = hosts.certificate_files(["b.cert", "a.cert", "a.key", "z.crt", "README"], "/d", OWN)
    assert found.tls.ca == ("/flag/ca", "/d/z.crt")
    assert found.tls.client == (("/d/a.cert", "/d/a.key"), ("/d/b.cert", ""), ("/flag/c", "/flag/k"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("server = 5", "server"),
        ("server = 'https://u:pw@h'", "user name"),
        ("server = 'https://h?x=1'", "want http"),
        ("server = 'ftp://h'", "ftp"),
        ("server = 'https://h:99999'", "99999"),
        ("server = 'https://'", "want http"),
        ("host = 5", "host"),
        ("[host]\n'h.test' = 5", "h.test"),
        ("capabilities = ['fly']", "capabilities"),
        ("capabilities = 'pull'", "capabilities"),
        ("ca = 5", "ca"),
        ("ca = ['']", "ca"),
        ("client = [['a']]", "client"),
        ("client = [['a', 'b', 'c']]", "client"),
        ("skip_verify = 'yes'", "skip_verify"),
        ("dial_timeout = 'soon'", "dial_timeout"),
        ("dial_timeout = 5", "dial_timeout"),
        ("[header]\n'a b' = 'x'", "HTTP field"),
        ('[header]\na = "x\\r\\nInjected: 1"', "HTTP field"),
        ("[header]\ncontent-length = '5'", "content-length"),
        ("this is no toml", "correct the file"),
        ("a = " + "[" * 100_000, "correct the file"),
    ],
)
def test_wrong_files_are_named(text: str, word: str) -> None:
    """Config that names file and key; the file's own secrets are not asked for."""
    with pytest.raises(Config, match=r"/d/hosts\.toml") as caught:
        hosts.parse(text.encode(), "/d", OWN)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pw@" not in str(caught.value)


@given(st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_hostile_bytes_raise_only_config(data: bytes) -> None:
    """Whatever the file holds: endpoints, or Config."""
    try:
        found = hosts.parse(data, "/d", OWN)
    except Config:
        return
    assert found[-1].host


VALUES = st.recursive(
    st.sampled_from(["'x'", "1", "true", "''", "'\\u0000'", "-inf", "2020-01-01", "'https://h'", "'1s'"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "capabilities",
        "ca",
        "client",
        "skip_verify",
        "override_path",
        "header",
        "dial_timeout",
        "server",
        "proxy",
    ]
)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.sampled_from(["", '[host."https://h.test"]']))
def test_any_type_under_any_key_raises_only_config(table: dict[str, str], head: str) -> None:
    """Values of every TOML type under every key, at the top and in a host: endpoints, or Config."""
    text = head + "\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
    try:
        found = hosts.parse(text.encode(), "/d", OWN)
    except Config:
        return
    assert all(each.scheme in ("http", "https") and " " not in each.host for each in found)


@given(st.text(max_size=60))
def test_any_host_url_gives_a_sendable_endpoint(url: str) -> None:
    """A host's URL that is taken can stand in a request line: no spaces, no control characters, no user."""
    text = "[host." + '"' + url.replace("\\", "\\\\").replace('"', '\\"') + '"]'
    try:
        first = hosts.parse(text.encode("utf-8", "surrogatepass"), "/d", OWN)[0]
    except Config:
        return
    assert all(33 <= ord(letter) < 127 for letter in first.host + first.path)
    assert "@" not in first.host


def test_directories_are_looked_through_in_order(tmp_path: Path) -> None:
    """The first directory that knows the registry counts, hosts.toml before certificates, an empty one is none."""
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "r.test").mkdir(parents=True)
    (first / "r.test" / "x.crt").write_text("")
    (second / "r.test").mkdir(parents=True)
    (second / "r.test" / "hosts.toml").write_text('server = "https://second.test"')
    (second / "_default").mkdir()
    (second / "_default" / "hosts.toml").write_text('server = "https://default.test"')
    found = CertsDirectories([tmp_path / "missing", first, second], lambda host: Endpoint("https", host))
    assert [each.host for each in found("r.test")] == ["r.test"]
    assert found("r.test")[0].tls.ca == (str(first / "r.test" / "x.crt"),)
    assert [each.host for each in found("other.test")] == ["default.test"]
    only_first = CertsDirectories([first], lambda host: Endpoint("https", host))
    assert only_first("other.test") == (Endpoint("https", "other.test"),)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """hosts.toml that is a directory: Config with its path."""
    (tmp_path / "r.test" / "hosts.toml").mkdir(parents=True)
    with pytest.raises(Config, match=r"hosts\.toml"):
        CertsDirectories([tmp_path], lambda host: Endpoint("https", host))("r.test")


def test_a_file_that_is_being_edited_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before goes on to count while the file is broken, and what is in it when it is whole again."""
    now = [0.0]
    monkeypatch.setattr("soci_snapshotter.registry.certsd.time.monotonic", lambda: now[0])
    file = tmp_path / "r.test" / "hosts.toml"
    file.parent.mkdir()
    found = CertsDirectories([tmp_path], lambda host: Endpoint("https", host))
    for text, expected in (
        ('server = "https://one.test"', "one.test"),
        ('server = "https://tw', "one.test"),
        ('server = "https://two.test"', "two.test"),
    ):
        file.write_text(text)
        assert [each.host for each in found("r.test")] == [expected]
        now[0] += 11


def test_mirrors_of_config_toml() -> None:
    """Host, port, scheme and namespace; never a place to push to; the registry's client certificate is not shown."""
    own = Endpoint("https", "registry-1.docker.io", tls=Tls(("ca",), (("c", "k"),)))
    made = mirror("m.test:5000", own, insecure=True, request_timeout=7.0)
    assert (made.scheme, made.host, made.path) == ("http", "m.test:5000", "/v2")
    assert (made.namespace, made.request_timeout, made.tls) == ("docker.io", 7.0, Tls(("ca",)))
    assert Capability.PUSH not in made.capabilities
    assert mirror("https://m.test/hub", own, insecure=True, request_timeout=None).path == "/hub/v2"
    assert mirror("m.test", own, insecure=False, request_timeout=None).scheme == "https"
    for wrong in ("", "a b", "u:p@m.test", "u:p@m.test:0", "m.test:0", "m.test/?x=1"):
        with pytest.raises(Config, match="mirror") as caught:
            mirror(wrong, own, insecure=False, request_timeout=None)
        assert "u:p" not in str(caught.value)
