"""Docker's config.json, credential helpers that are real programs, and several sources in their order."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Config
from soci_snapshotter.formats import dockerconfig
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.registry import once
from soci_snapshotter.registry.credentials import DockerConfig
from soci_snapshotter.registry.credhelpers import Helpers
from soci_snapshotter.registry.keychains import Keychain, keychain

HUB = "registry-1.docker.io"


def auth(pair: str) -> dict[str, str]:
    return {"auth": base64.b64encode(pair.encode()).decode()}


def logins(document: object, host: str, repository: str = "a/b") -> list[Login]:
    """What a config.json of this content has."""
    return list(dockerconfig.parse(json.dumps(document).encode(), "x").logins(host, repository))


# --- the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "host", "repository", "fits"),
    [
        ("r.test", "r.test", "a/b", True),
        ("https://r.test", "r.test", "a/b", True),
        ("http://r.test/v2/", "r.test", "a/b", True),
        ("r.test:5000", "r.test:5000", "a/b", True),
        ("R.test", "r.test", "a/b", True),
        ("r.test", "r.test:5000", "a/b", False),
        ("r.test:5000", "r.test", "a/b", False),
        ("r.test", "xr.test", "a/b", False),
        ("r.test", "r.test.evil.test", "a/b", False),
        ("evil.test/r.test", "r.test", "a/b", False),
        ("https://index.docker.io/v1/", HUB, "library/x", True),
        ("docker.io", HUB, "library/x", True),
        ("https://index.docker.io/v1/", "r.test", "library/x", False),
        ("r.test/a", "r.test", "a/b", True),
        ("r.test/a/b", "r.test", "a/b", True),
        ("r.test/a/b", "r.test", "a/bc", False),
        ("r.test/other", "r.test", "a/b", False),
        ("*.r.test", "x.r.test", "a/b", True),
        ("reg*.r.test:5000", "reg7.r.test:5000", "a/b", True),
        ("*.r.test", "x.y.r.test", "a/b", False),
        ("*.r.test", "r.test", "a/b", False),
        ("*.test:5000", "r.test:5001", "a/b", False),
        ("r.te.t", "r.test", "a/b", False),
    ],
)
def test_an_entry_is_for_its_registry_and_no_other(key: str, host: str, repository: str, fits: bool) -> None:
    """Scheme and API path count for nothing, port, path and each label for all; no host gets another's login."""
    found = logins({"auths": {key: auth("me:pw")}}, host, repository)
    assert found == ([Login("me", "pw")] if fits else [])


NAMES = st.from_regex(r"[ab]{1,2}(\.[ab]){0,2}(:[12])?", fullmatch=True)


@given(NAMES, NAMES)
def test_hosts_without_a_star_fit_only_themselves(one: str, other: str) -> None:
    """For any two names: equal or nothing."""
    assert bool(logins({"auths": {one: auth("u:p")}}, other)) == (one == other)


def test_the_longest_path_comes_first() -> None:
    """Several entries fit: the most particular one is the first, the others are there for when it is rejected."""
    auths = {
        "*.test": auth("star:1"),
        "r.test": auth("all:2"),
        "r.test/a/b": auth("own:3"),
        "r.test/a": auth("a:4"),
    }
    assert [login.user for login in logins({"auths": auths}, "r.test")] == ["own", "a", "all", "star"]


def test_every_kind_of_entry() -> None:
    """User and password (which may hold colons, and Docker's padding), identity token, registry token, and none."""
    entries = {
        "a.test": auth("me:p:w\0\0"),
        "b.test": {"username": "u", "password": "p"},
        "c.test": {**auth("<token>:"), "identitytoken": "idt"},
        "d.test": {"registrytoken": "rt"},
        "e.test": {},
        "f.test": None,
    }
    found = [logins({"auths": entries}, f"{each}.test") for each in "abcdef"]
    assert found == [
        [Login("me", "p:w")],
        [Login("u", "p")],
        [Login("", "idt")],
        [Login("", "rt", registry_token=True)],
        [],
        [],
    ]


@pytest.mark.parametrize(
    "text",
    [
        b'{"auths": {"r.test": {"auth": "MARKED-SECRET"',
        b'{"auths": {"r.test": {"auth": {"x": "MARKED-SECRET"}}}}',
        b'{"auths": {"r.test": {"auth": "MARKED-SECRET"}}}',
        b'{"auths": "MARKED-SECRET"}',
        b"MARKED-SECRET",
        b"\xff\xfe MARKED-SECRET",
        b"[" * 100_000,
        b" " * (2 << 20),
    ],
)
def test_a_broken_file_is_named_and_not_quoted(tmp_path: Path, text: bytes) -> None:
    """However it is broken: one line with the file's name, no part of what is in it."""
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(Config, match=str(path)) as caught:
        list(DockerConfig(path).logins("r.test", "a/b"))
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """Missing, there, changed, broken, mended, gone: each is seen at the next question."""
    path = tmp_path / "config.json"
    config = DockerConfig(path)
    assert config("r.test") is None
    for user in ("one", "other"):
        path.write_text(json.dumps({"auths": {"r.test": auth(f"{user}:pw")}}))
        assert config("r.test") == (user, "pw")
    path.write_text("{")
    with pytest.raises(Config):
        config("r.test")
    path.write_text(json.dumps({"auths": {"r.test": auth("third:pw")}}))
    assert config("r.test") == ("third", "pw")
    path.unlink()
    assert config("r.test") is None


# --- helpers --------------------------------------------------------------------------------------------------


class Box:
    """A directory of helpers, each of which notes how often it ran."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, script: str, mode: int = 0o755) -> None:
        program = self.directory / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\necho run >> {self.directory}/{name}.runs\n{script}\n")
        program.chmod(mode)

    def runs(self, name: str) -> int:
        noted = self.directory / f"{name}.runs"
        return len(noted.read_text().splitlines()) if noted.exists() else 0

    def helpers(self, timeout: float = 10.0) -> Helpers:
        return Helpers({"PATH": f"{self.directory}:{os.environ['PATH']}", "MINE": "value"}, timeout=timeout)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


ANSWER = """echo '{"ServerURL":"x","Username":"me","Secret":"MARKED-SECRET"}'"""


def test_a_helper_is_asked_for_its_host(box: Box) -> None:
    """It is run as `get` with the host on stdin, without a shell, with our environment; Docker Hub by its old URL."""
    box.put("ok", f"""[ "$1" = get ] && [ "$MINE" = value ] && cat > {box.directory}/asked; {ANSWER}""")
    helpers = box.helpers()
    assert helpers.login("ok", "r.test:5000") == Login("me", "MARKED-SECRET")
    assert (box.directory / "asked").read_text() == "r.test:5000"
    helpers.login("ok", HUB)
    assert (box.directory / "asked").read_text() == "https://index.docker.io/v1/"
    helpers.login("ok", "$(touch pwned)")
    assert (box.directory / "asked").read_text() == "$(touch pwned)"


def test_what_a_helper_may_answer(box: Box) -> None:
    """An identity token is told by its user name; "not found" and an empty secret mean that there is none."""
    box.put("token", """echo '{"Username":"<token>","Secret":"idt"}'""")
    box.put("none", "echo 'credentials not found in native keychain'; exit 1")
    box.put("empty", """echo '{"Username":"me","Secret":""}'""")
    helpers = box.helpers()
    assert helpers.login("token", "r.test") == Login("", "idt")
    assert helpers.login("none", "r.test") is None
    assert helpers.login("empty", "r.test") is None


@pytest.mark.parametrize(
    ("script", "mode", "word"),
    [
        ("echo MARKED-SECRET", 0o755, "not a login"),
        ("""echo '{"Secret": 5, "Username": "MARKED-SECRET"}'""", 0o755, "not a login"),
        ("echo MARKED-SECRET; exit 3", 0o755, "status 3"),
        ("kill -9 $$", 0o755, "status -9"),
        (ANSWER, 0o644, "no such program"),
        ("yes MARKED-SECRET", 0o755, "more than"),
        ("sleep 600", 0o755, "no answer within"),
        (f"{ANSWER}; sleep 600", 0o755, "no answer within"),
        ("sleep 600 & exec sleep 600", 0o755, "no answer within"),
    ],
)
def test_a_bad_helper_is_named_with_its_host(box: Box, script: str, mode: int, word: str) -> None:
    """Garbage, a failure, not executable, endless, hanging: one line with helper and host, nothing quoted."""
    box.put("bad", script, mode)
    with pytest.raises(Config, match=rf"docker-credential-bad for r\.test: .*{word}") as caught:
        box.helpers(timeout=0.5).login("bad", "r.test")
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_program_and_odd_names(box: Box) -> None:
    """Not a program at all, not there, and names that would leave PATH: named, nothing is run."""
    program = box.directory / "docker-credential-elf"
    program.write_bytes(b"\x7fELF garbage")
    program.chmod(0o755)
    (box.directory / "evil").write_text("#!/bin/sh\ntouch pwned\n")
    for name in ("elf", "absent", "../evil", "/evil", "-x", "", "a b", "x" * 300):
        with pytest.raises(Config, match=r"docker-credential-.* for r\.test"):
            box.helpers().login(name, "r.test")


def test_what_a_hanging_helper_started_is_killed_too(box: Box) -> None:
    """No process of it is left: its group is killed by the id that we started."""
    box.put("hang", f"sleep 612 & echo $! > {box.directory}/child; wait")
    with pytest.raises(Config, match="no answer"):
        box.helpers(timeout=1.0).login("hang", "r.test")
    child = int((box.directory / "child").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and _alive(child):
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_answers_and_failures_are_remembered_shortly(box: Box) -> None:
    """30 layers run a helper once, failing or not, also all at once; after a rejection it is run anew."""
    box.put("ok", f"sleep 0.2; {ANSWER}")
    box.put("bad", "exit 9")
    helpers = box.helpers()
    found: list[Login | None] = []
    threads = [threading.Thread(target=lambda: found.append(helpers.login("ok", "r.test"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Login("me", "MARKED-SECRET")] * 8
    assert box.runs("ok") == 1
    for _ in range(5):
        with pytest.raises(Config):
            helpers.login("bad", "r.test")
    assert box.runs("bad") == 1
    time.sleep(2.1)  # what is older than a moment is not what a rejection is answered with
    helpers.login("ok", "r.test", fresh=True)
    helpers.login("ok", "r.test", fresh=True)
    assert box.runs("ok") == 2


def test_the_file_says_which_helper(box: Box) -> None:
    """credHelpers before credsStore, for its host only; what it has not is taken from auths."""
    box.put("own", """echo '{"Username":"own","Secret":"1"}'""")
    box.put("store", """echo '{"Username":"store","Secret":"2"}'""")
    box.put("none", "echo 'credentials not found in native keychain'; exit 1")
    path = box.directory / "config.json"
    document = {"credHelpers": {"r.test": "own", "n.test": "none"}, "credsStore": "store"}
    document["auths"] = {"n.test": auth("inline:3"), "r.test": {}, "q.test": {}}  # type: ignore[assignment]
    path.write_text(json.dumps(document))
    config = DockerConfig(path, box.helpers())
    assert [each.user for each in config.logins("r.test", "a")] == ["own"]
    assert [each.user for each in config.logins("q.test", "a")] == ["store"]
    assert [each.user for each in config.logins("n.test", "a")] == ["inline"]


def test_a_broken_entry_comes_after_the_good_ones() -> None:
    """Entries that fit are given although one before them is broken; the first broken one is named at the end."""
    auths = {"r.test/a/b": {"auth": "!!!"}, "r.test/a": {"auth": "???"}, "r.test": auth("me:pw")}
    file = dockerconfig.parse(json.dumps({"auths": auths}).encode(), "x")
    found: list[Login] = []
    with pytest.raises(Config, match=r"auths\['r.test/a/b'\]"):
        for login in file.logins("r.test", "a/b"):
            found.append(login)
    assert found == [Login("me", "pw")]
    assert "r.test/a" in str(file.problem())
    assert dockerconfig.parse(b'{"auths": {"r.test": {}}}', "x").problem() is None


def test_nobody_waits_without_end_for_another_threads_helper(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread runs the helper and does not come back: who waits for its answer gets Config, naming the helper."""
    monkeypatch.setattr(once, "_WAIT", 0.05)
    box.put("slow", f"while [ ! -e {box.directory}/go ]; do sleep 0.02; done; {ANSWER}")
    helpers = box.helpers()
    first = threading.Thread(target=lambda: helpers.login("slow", "r.test"))
    first.start()
    try:
        while not box.runs("slow"):
            time.sleep(0.01)
        with pytest.raises(Config, match=r"slow for r\.test: no answer"):
            helpers.login("slow", "r.test")
    finally:
        (box.directory / "go").touch()
        first.join()


# --- several sources ------------------------------------------------------------------------------------------


class Source:
    """Answers what it is told to, and counts."""

    def __init__(self, *answers: Login, error: Config | None = None) -> None:
        self.answers, self.error, self.asked = answers, error, 0

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        yield from self.answers


def test_the_first_answer_counts_and_the_rest_is_not_asked() -> None:
    """Sources are asked in their order and no further than needed; each login comes once."""
    one, two, three = Source(), Source(Login("a", "1")), Source(Login("a", "1"), Login("b", "2"))
    chain = Keychain([one, two, three])
    assert next(chain.logins("r.test", "x")) == Login("a", "1")
    assert (one.asked, two.asked, three.asked) == (1, 1, 0)
    assert [each.user for each in chain.logins("r.test", "x")] == ["a", "b"]


def test_a_source_that_fails_is_told_once_and_passed(caplog: pytest.LogCaptureFixture) -> None:
    """The others are asked; the log has one line for it; with nothing else its error is the answer."""
    bad = Source(error=Config("broken.json: not JSON"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert list(Keychain([bad, Source(Login("a", "1"))]).logins("r.test", "x")) == [Login("a", "1")]
        chain = Keychain([bad, Source()])
        for _ in range(3):
            with pytest.raises(Config, match=r"broken\.json"):
                list(chain.logins("r.test", "x"))
    assert sum("broken.json" in str(record.__dict__.get("reason")) for record in caplog.records) == 4


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    """Not of logins, files, or what holds them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"r.test": {"username": "me", "password": "MARKED-SECRET"}}}))
    config = DockerConfig(path)
    found = next(config.logins("r.test", "x"))
    file = dockerconfig.parse(path.read_bytes(), "x")
    assert "SECRET" not in repr([found, config, file, keychain(config), keychain(lambda _: ("a", "b"))])
