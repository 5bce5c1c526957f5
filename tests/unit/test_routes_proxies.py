"""Which proxy a connection goes through, by the environment; expectations are Go's (golang.org/x/net/http/httpproxy)."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Config
from soci_snapshotter.registry.proxies import from_environment
from soci_snapshotter.registry.urls import Origin, split

BOTH = {"HTTP_PROXY": "http://plain.test:3128", "HTTPS_PROXY": "secure.test"}


def used(url: str, **environ: str) -> str | None:
    """The proxy for `url`."""
    proxy = from_environment({**BOTH, **environ}).of(split(url)[0])
    return None if proxy is None else str(proxy)


def test_each_scheme_has_its_proxy() -> None:
    """HTTP_PROXY for http, HTTPS_PROXY for https, in either case, upper first; without a scheme it is http, port 80."""
    assert used("http://a.test/") == "plain.test:3128"
    assert used("https://a.test/") == "secure.test:80"
    assert used("https://a.test/", HTTPS_PROXY="", https_proxy="https://lower.test") == "lower.test:443"
    assert used("https://a.test/", HTTPS_PROXY="") is None
    assert from_environment({}).of(Origin("http", "a.test", 80)) is None


@pytest.mark.parametrize("url", ["http://localhost:5000/", "https://127.0.0.9/", "http://[::1]:5000/"])
def test_loopback_is_never_asked_through_a_proxy(url: str) -> None:
    """Whatever the variables say."""
    assert used(url) is None


@pytest.mark.parametrize(
    ("no_proxy", "direct", "proxied"),
    [
        ("*", ["a.test", "10.1.2.3"], []),
        ("example.test", ["example.test", "b.example.test", "EXAMPLE.test"], ["anexample.test", "test"]),
        (".example.test", ["b.example.test"], ["example.test"]),
        ("*.example.test", ["b.example.test", "c.b.example.test"], ["example.test"]),
        ("example.test:8443", ["example.test:8443"], ["example.test", "example.test:8444"]),
        ("10.0.0.0/8", ["10.255.0.1", "10.0.0.1:5000"], ["11.0.0.1", "ten.test"]),
        ("10.1.2.3, 10.1.2.4:5000", ["10.1.2.3", "10.1.2.4:5000"], ["10.1.2.4", "110.1.2.3"]),
        ("fd00::/8,[2001:db8::1]:5000", ["[fd12::1]", "[2001:db8::1]:5000"], ["[2001:db8::1]"]),
        (" , :80, ., a.test ,", ["a.test"], ["b.test"]),
    ],
)
def test_no_proxy(no_proxy: str, direct: list[str], proxied: list[str]) -> None:
    """Names with all below them, only what is below, ports, addresses and networks; what means nothing is skipped."""
    for host in direct:
        assert used(f"https://{host}/", NO_PROXY=no_proxy) is None, host
        assert used(f"https://{host}/", no_proxy=no_proxy) is None, host
    for host in proxied:
        assert used(f"https://{host}/", NO_PROXY=no_proxy) is not None, host


def test_user_and_password_are_for_the_proxy_and_shown_nowhere() -> None:
    """They become a Proxy-Authorization, percent-decoded, and are in no repr or URL; the value survives pickling."""
    proxies = from_environment({"HTTPS_PROXY": "http://me:se%3Acret@p.test:8080"})
    proxy = pickle.loads(pickle.dumps(proxies)).https  # noqa: S301 - our own
    assert proxy.authorization == "Basic bWU6c2U6Y3JldA=="
    assert proxy.url == "http://p.test:8080"
    assert "cret" not in repr(proxies) + str(proxy)


@pytest.mark.parametrize(
    "value", ["socks5://p.test", "http://p.test:port", "http://:80", "ftp://MARKED@p.test"]
)
def test_a_proxy_that_cannot_be_used_is_an_error(value: str) -> None:
    """Config naming the variable, and not its value, which may hold a password."""
    with pytest.raises(Config, match="HTTP_PROXY") as caught:
        from_environment({"HTTP_PROXY": value})
    assert "MARKED" not in str(caught.value)


def test_a_cgi_program_takes_no_proxy_from_its_headers() -> None:
    """With REQUEST_METHOD set, HTTP_PROXY may be a header of a stranger's: not used, as in Go."""
    assert used("http://a.test/", REQUEST_METHOD="GET") is None


@given(st.text(max_size=60), st.text(max_size=40))
def test_any_environment_parses_or_is_config(no_proxy: str, proxy: str) -> None:
    """No other error, whatever stands there."""
    try:
        proxies = from_environment({"NO_PROXY": no_proxy, "HTTPS_PROXY": proxy})
    except Config:
        return
    proxies.of(Origin("https", "a.test", 443))
