"""What the daemon's configuration and environment say about registries."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci_snapshotter.daemon import config
from soci_snapshotter.daemon.registries import registry_hosts, registry_options
from soci_snapshotter.errors import Config
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.urls import Origin


def options(text: str, **environ: str) -> Options:
    """What a config.toml and the environment come to."""
    return registry_options(config.parse(text.encode(), "c.toml")[0], environ)


def asked(text: str, host: str) -> list[str]:
    """The URLs of a registry's endpoints, in order."""
    return [f"{each.scheme}://{each.host}{each.path}" for each in endpoints(text, host)]


def endpoints(text: str, host: str) -> list[Endpoint]:
    """The endpoints of a registry, in order."""
    read, warnings = config.parse(text.encode(), "c.toml")
    assert warnings == []
    return list(registry_hosts(read, registry_options(read, {}))(host))


def test_every_timeout_and_retry_key_counts() -> None:
    """[http]'s in milliseconds; [blob]'s retries for spans only, [http]'s where they are not set."""
    made = options(
        "max_concurrency = 7\n"
        "[http]\nDialTimeoutMsec = 1500\nResponseHeaderTimeoutMsec = 2500\nRequestTimeoutMsec = 60000\n"
        "MaxRetries = 3\nMinWaitMsec = 10\nMaxWaitMsec = 2000\n"
        "[blob]\nmax_retries = 5\nmax_wait_msec = 1000\n"
    )
    assert (made.connect_timeout, made.head_timeout, made.request_timeout) == (1.5, 2.5, 60.0)
    assert made.retry == Retry(3, 0.01, 2.0)
    assert made.span_retry == Retry(5, 0.01, 1.0)
    assert made.connections == 7


def test_the_go_daemon_s_header_timeout_counts_as_unset() -> None:
    """3 s for a head, which `config default` writes, are too few for a cache that fetches first; 0 is the default."""
    for text in ("", "[http]\nResponseHeaderTimeoutMsec = 3000", "[http]\nDialTimeoutMsec = 0"):
        made = options(text)
        assert (made.connect_timeout, made.head_timeout, made.connections) == (3.0, None, 100)
    assert options("max_concurrency = -1").connections is None


def test_proxies_are_those_of_the_environment() -> None:
    """HTTPS_PROXY of what is given, and of nothing else."""
    origin = Origin("https", "r.test", 443)
    assert str(options("", HTTPS_PROXY="p.test:1").proxies.of(origin)) == "p.test:1"
    assert options("").proxies.of(origin) is None


MIRRORS = """
[[resolver.host."r.test:5000".mirrors]]
host = "one.test"
request_timeout_sec = 5
[[resolver.host."r.test:5000".mirrors]]
host = "two.test:8080"
insecure = true
request_timeout_sec = -1
[[resolver.host."docker.io".mirrors]]
host = "127.0.0.1:5001"
"""


def test_mirrors_come_in_order_and_then_the_registry() -> None:
    """https, or http where insecure or loopback; the namespace is the registry's; others have none."""
    assert asked(MIRRORS, "r.test:5000") == [
        "https://one.test/v2",
        "http://two.test:8080/v2",
        "https://r.test:5000/v2",
    ]
    found = endpoints(MIRRORS, "r.test:5000")
    assert [each.request_timeout for each in found] == [5.0, float("inf"), None]
    assert [each.namespace for each in found] == ["r.test:5000", "r.test:5000", ""]
    assert asked(MIRRORS, "registry-1.docker.io") == [
        "http://127.0.0.1:5001/v2",
        "https://registry-1.docker.io/v2",
    ]
    assert asked(MIRRORS, "other.test") == ["https://other.test/v2"]


def test_hosts_toml_comes_behind_them_and_may_name_another_server(tmp_path: Path) -> None:
    """One configuration with containerd's: the directories of config_path; "" reads none."""
    file = tmp_path / "r.test_5000_" / "hosts.toml"
    file.parent.mkdir()
    file.write_text('server = "https://up.test"\n[host."http://three.test"]\ncapabilities = ["pull"]\n')
    text = f'[resolver]\nconfig_path = "{tmp_path / "none"}:{tmp_path}"\n' + MIRRORS
    assert asked(text, "r.test:5000")[2:] == ["http://three.test/v2", "https://up.test/v2"]
    text = '[resolver]\nconfig_path = ""\n'
    assert asked(text, "r.test:5000") == ["https://r.test:5000/v2"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            '[[resolver.host."r.test".mirrors]]\ninsecure = true',
            r"resolver\.host\.'r\.test'\.mirrors\[0\]\.host",
        ),
        ('[[resolver.host."r.test".mirrors]]\nhost = "a b"', r"mirrors\[0\]\.host: mirror 'a b'"),
        ('[resolver]\nconfig_path = "certs.d"', "resolver.config_path = 'certs.d'"),
    ],
)
def test_what_cannot_be_used_refuses_to_start(text: str, named: str) -> None:
    """Config naming file and key."""
    with pytest.raises(Config, match=f"c.toml: .*{named}"):
        config.parse(text.encode(), "c.toml")
