"""Who failed a moment ago, who is tried again, and in which order a registry's endpoints are asked because of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.hosts import Capability, Endpoint
from soci_snapshotter.registry.breaker import DOUBTED, PASSED_OVER, Breaker
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.urls import Repository

BLOB = digests.sha256(b"blob")
REPO = Repository("home.test", "r")


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_who_failed_is_passed_over_and_tried_by_one_after_a_time() -> None:
    """Within the time nobody asks it, then one does while the others do not, until it has worked."""
    clock = Clock()
    breaker = Breaker(clock)
    assert breaker.failed("a")
    assert not breaker.failed("a")
    assert breaker.failing(["a", "b"]) == {"a"}
    clock.now += PASSED_OVER
    assert breaker.failing(["a"]) == set()
    assert breaker.failing(["a"]) == {"a"}
    assert breaker.worked("a")
    assert not breaker.worked("a")
    assert breaker.failing(["a"]) == set()


def test_what_is_remembered_is_bounded() -> None:
    """The oldest host is forgotten first: names that an attacker makes up take no memory."""
    breaker = Breaker()
    for number in range(5000):
        breaker.failed(f"h{number}")
    assert breaker.failing(["h0", "h4999"]) == {"h4999"}


@pytest.fixture
def client() -> RegistryClient:
    """Two mirrors and a registry, none of which is asked for anything."""
    endpoints = [Endpoint("https", f"{name}.test") for name in ("one", "two", "home")]
    made = RegistryClient(hosts=lambda _host: endpoints)
    made.router.breaker = Breaker(Clock())
    return made


def order(client: RegistryClient) -> list[str]:
    """The hosts in the order in which they are asked for BLOB."""
    routes = client.router.routes(REPO, Capability.PULL, BLOB)
    assert [each.endpoint.host for each in routes if each.last] == ["home.test"]
    return [each.endpoint.host.removesuffix(".test") for each in routes]


def test_mirrors_that_failed_are_asked_behind_the_registry(client: RegistryClient) -> None:
    """In order as long as all is well; one that failed is last; one that lacks something, or the registry, is not."""
    assert order(client) == ["one", "two", "home"]
    one, two, home = client.router.routes(REPO, Capability.PULL)
    client.router.blame(two, NotFound("x"))
    client.router.blame(home, Remote("x"))
    assert order(client) == ["one", "two", "home"]
    client.router.blame(one, Remote("x"))
    assert order(client) == ["two", "home", "one"]
    client.router.praise(one)
    assert order(client) == ["one", "two", "home"]


def test_the_registry_comes_first_for_a_blob_of_which_a_mirror_had_other_bytes(
    client: RegistryClient,
) -> None:
    """For this blob, for a time; other blobs come from mirrors as before."""
    clock = Clock()
    client.router.breaker = Breaker(clock)
    client.router.breaker.doubt(BLOB)
    assert order(client) == ["home", "one", "two"]
    others = client.router.routes(REPO, Capability.PULL, digests.sha256(b"other"))
    assert others[0].endpoint.host == "one.test"
    clock.now += DOUBTED
    assert order(client) == ["one", "two", "home"]


def failing(*hosts: str, error: Callable[[str], Exception] = Remote) -> Callable[[Route], str]:
    """An attempt that fails at these hosts."""

    def attempt(route: Route) -> str:
        if route.endpoint.host.removesuffix(".test") in hosts:
            raise error(route.endpoint.host)
        return route.endpoint.host

    return attempt


def test_a_mirror_that_failed_still_helps_when_the_registry_is_away(client: RegistryClient) -> None:
    """Both mirrors failed a moment ago and the registry fails now: the mirrors are asked once more."""
    assert client.router.over(REPO, Capability.PULL, failing("one", "two")) == "home.test"
    assert client.router.over(REPO, Capability.PULL, failing("home", "one")) == "two.test"
    with pytest.raises(Remote, match=r"home\.test"):
        client.router.over(REPO, Capability.PULL, failing("home", "one", "two"))


def test_what_the_registry_says_is_not_there_is_not_there(client: RegistryClient) -> None:
    """NotFound of the registry ends it, although a mirror that failed is left."""
    client.router.over(REPO, Capability.PULL, failing("one"))
    with pytest.raises(NotFound, match=r"home\.test"):
        client.router.over(REPO, Capability.PULL, failing("two", "home", error=NotFound))


def test_uploads_go_to_one_place(client: RegistryClient) -> None:
    """Where uploads go does not depend on what failed a moment ago."""
    one = client.router.routes(REPO, Capability.PULL)[0]
    client.router.blame(one, Remote("x"))
    assert client.router.pushing(REPO).endpoint.host == "one.test"
