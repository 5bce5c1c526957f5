"""Pull secrets of a cluster by list and watch, against an API server with TLS; and kubeconfigs that cannot be used."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.kubeapi import KubeApi, start_kube_api
from harness.tlsfront import Authority, make_authority

from soci_snapshotter.daemon import kubeconfig
from soci_snapshotter.daemon.kubesecrets import KubeSecrets
from soci_snapshotter.errors import Config

TOKEN = "MARKED-SECRET-token"


def secret(host: str, user: str) -> dict[str, object]:
    """What `kubectl create secret docker-registry` puts into a secret."""
    pair = base64.b64encode(f"{user}:MARKED-SECRET".encode()).decode()
    return {"auths": {host: {"username": user, "password": "MARKED-SECRET", "auth": pair}}}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("pki") / "ca")


@pytest.fixture
def api(tmp_path: Path, authority: Authority) -> Iterator[KubeApi]:
    with start_kube_api(tmp_path, authority, token=TOKEN) as found:
        yield found


@contextmanager
def synced(api: KubeApi, path: Path | None = None) -> Iterator[KubeSecrets]:
    """A source that has listed once."""
    path = path or api.kubeconfig(api.directory / "kubeconfig", token=TOKEN)
    with KubeSecrets(path, first_wait=0.05) as source:
        until(lambda: source.lists > 0)
        yield source


def users(source: KubeSecrets, host: str = "r.test") -> list[str]:
    """Whose logins there are for a host."""
    return [login.user for login in source.logins(host, "a/b")]


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_list_and_watch(api: KubeApi) -> None:
    """All pages are listed; what is added, changed and deleted later is seen without another list."""
    for number in range(5):
        api.put(f"s{number}", secret("r.test", f"u{number}"))
    with synced(api) as source:
        assert users(source) == [f"u{number}" for number in range(5)]
        assert users(source, "other.test") == []
        api.put("s5", secret("r.test", "u5"), namespace="a")
        until(lambda: users(source)[0] == "u5")
        api.put("s5", secret("other.test", "u5"), namespace="a")
        until(lambda: users(source, "other.test") == ["u5"])
        api.delete("s5", namespace="a")
        until(lambda: users(source, "other.test") == [])
        assert source.lists == 1
    assert api.asked[:4] == ["list", "page", "page", "watch 15"]


def test_a_watch_that_ends_goes_on_from_its_version(api: KubeApi) -> None:
    """The server ends it: the next begins where it ended; nothing is listed again, nothing is missed."""
    api.put("s", secret("r.test", "one"))
    with synced(api) as source:
        until(lambda: "watch 11" in api.asked)
        api.put("s", secret("r.test", "two"))
        until(lambda: users(source) == ["two"])
        api.cut()
        until(lambda: "watch 12" in api.asked)
        api.put("s", secret("r.test", "three"))
        until(lambda: users(source) == ["three"])
        assert source.lists == 1


@pytest.mark.parametrize("status", ["of the request", "in the stream"])
def test_410_lists_anew(api: KubeApi, status: str, caplog: pytest.LogCaptureFixture) -> None:
    """A version that is too old, however that is said: the list is made again without a warning, for it is no fault,
    and what went meanwhile is gone."""
    api.put("gone", secret("r.test", "gone"))
    api.put("kept", secret("r.test", "kept"))
    with synced(api) as source:
        until(lambda: any(each.startswith("watch") for each in api.asked))
        api.delete("gone", told=False)
        if status == "of the request":
            api.oldest = api.version
            api.cut()
        else:
            api.send(json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410}}).encode())
        until(lambda: source.lists > 1)
        until(lambda: users(source) == ["kept"])
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "line",
    [
        b"garbage MARKED-SECRET",
        b'{"type": 5}',
        b"[]",
        b"x" * (5 << 20),
        b'{"type":"ERROR","object":{"code":500}}',
    ],
    ids=["garbage", "shape", "array", "endless", "error"],
)
def test_a_watch_that_goes_wrong_is_begun_anew(
    api: KubeApi, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """What the server sends is no change of a secret: logged without quoting it, what is known stays, and it goes on."""
    api.put("s", secret("r.test", "one"))
    with caplog.at_level(logging.DEBUG), synced(api) as source:
        until(lambda: any(each.startswith("watch") for each in api.asked))
        api.send(line)
        until(lambda: source.lists > 1)
        assert users(source) == ["one"]
        api.put("s", secret("r.test", "two"))
        until(lambda: users(source) == ["two"])
    assert any("not in sync" in record.message for record in caplog.records)
    assert "MARKED-SECRET" not in "".join(str(record.__dict__) for record in caplog.records)


def test_a_broken_secret_spoils_no_other(api: KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    """Not base64, no JSON, a broken entry: named in the log by namespace and name, not quoted; the rest serves."""
    api.put("good", secret("r.test", "good"))
    api.put("json", b'{"auths": MARKED-SECRET')
    api.put("entry", {"auths": {"r.test": {"auth": "MARKED-SECRET"}}})
    api.secrets["default/odd"] = {
        "metadata": {"name": "odd", "namespace": "default", "resourceVersion": "1"},
        "data": {".dockerconfigjson": "MARKED-SECRET!"},
    }
    api.secrets["default/empty"] = {"metadata": {"name": "empty", "namespace": "default"}}
    with caplog.at_level(logging.DEBUG), synced(api) as source:
        assert users(source) == ["good"]
    told = "".join(str(record.__dict__) for record in caplog.records)
    assert "default/json" in told
    assert "default/odd" in told
    assert "MARKED-SECRET" not in told


def test_a_broken_entry_hides_no_good_one(api: KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    """The entry that fits best is broken: the next one serves, and the log names the broken one, once, unquoted."""
    good = secret("r.test", "good")["auths"]
    assert isinstance(good, dict)
    api.put("mixed", {"auths": {"r.test/a/b": {"auth": "MARKED-SECRET"}, **good}})
    with caplog.at_level(logging.DEBUG), synced(api) as source:
        assert users(source) == ["good"]
        assert users(source) == ["good"]
        api.put(
            "mixed", {"auths": {"r.test/a/b": {"auth": "MARKED-SECRET"}, **secret("r.test", "new")["auths"]}}
        )  # type: ignore[dict-item]
        until(lambda: users(source) == ["new"])
    told = [str(record.__dict__.get("reason")) for record in caplog.records]
    assert len([each for each in told if "default/mixed" in each and "r.test/a/b" in each]) == 1
    assert "MARKED-SECRET" not in str([record.__dict__ for record in caplog.records])


def test_a_server_that_is_away_or_refuses_is_asked_until_it_answers(
    api: KubeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No kubeconfig yet, a wrong token, garbage: each is logged once in one line; when it is mended, secrets come."""
    api.put("s", secret("r.test", "one"))
    path = tmp_path / "late"
    file = tmp_path / "token"
    with caplog.at_level(logging.WARNING), KubeSecrets(path, first_wait=0.02) as source:
        until(lambda: "late" in str([record.__dict__.get("reason") for record in caplog.records]))
        file.write_text("MARKED-SECRET-wrong\n")
        api.kubeconfig(path, tokenFile=str(file))
        until(lambda: api.asked.count("refused") > 1)
        assert users(source) == []
        api.garbage = b"<html>MARKED-SECRET</html>"
        file.write_text(TOKEN + "\n")  # renewed in its file, as service account tokens are
        until(lambda: users(source) == ["one"])
    reasons = [str(record.__dict__.get("reason")) for record in caplog.records]
    assert any("HTTP 401" in reason for reason in reasons)
    assert any("no list of secrets" in reason for reason in reasons)
    assert len(reasons) <= 4
    assert "MARKED-SECRET" not in str(reasons)


def test_client_certificates(tmp_path: Path, authority: Authority) -> None:
    """By data in the kubeconfig and by files beside it; without one, or with another CA, there is no connection."""
    with start_kube_api(tmp_path, authority, certificate=True) as api:
        api.put("s", secret("r.test", "one"))
        certificate, key = api.authority.issue("client", client=True)
        data = [base64.b64encode(each.read_bytes()).decode() for each in (certificate, key)]
        one = api.kubeconfig(tmp_path / "one", client_certificate_data=data[0], client_key_data=data[1])
        other = api.kubeconfig(
            authority.directory / "two", client_certificate=certificate.name, client_key=key.name
        )
        for path in (one, other):
            with synced(api, path) as source:
                assert users(source) == ["one"]
        without = api.kubeconfig(tmp_path / "none")
        with KubeSecrets(without, first_wait=0.01) as source:
            time.sleep(0.3)
            assert source.lists == 0


def test_the_server_must_be_who_it_says(api: KubeApi, tmp_path: Path) -> None:
    """A CA that did not sign its certificate: nothing is sent, not even the token."""
    path = api.kubeconfig(tmp_path / "kubeconfig", token=TOKEN)
    with start_kube_api(tmp_path / "s", make_authority(tmp_path / "other"), token=TOKEN) as stranger:
        path.write_text(path.read_text().replace(api.url, stranger.url))
        with KubeSecrets(path, first_wait=0.01) as source:
            time.sleep(0.3)
            assert source.lists == 0
        assert stranger.asked == []


def test_stopping_does_not_wait_for_the_watch(api: KubeApi) -> None:
    """A watch that is silent for minutes is ended at once."""
    with synced(api):
        until(lambda: any(each.startswith("watch") for each in api.asked))
        started = time.monotonic()
    assert time.monotonic() - started < 10


# --- kubeconfigs ----------------------------------------------------------------------------------------------

GOOD = """current-context: here
contexts: [{name: here, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://api.test:6443"}}]
users: [{name: u, user: {token: MARKED-SECRET}}]
"""


def test_yaml_and_json_are_read(tmp_path: Path) -> None:
    """Both forms give the same; null stands for an absent field; no secret is in the repr."""
    path = tmp_path / "k"
    path.write_text(GOOD)
    one = kubeconfig.load(path)
    document = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://api.test:6443/"}}],
        "users": [{"name": "u", "user": {"token": "MARKED-SECRET", "exec": None}}],
    }
    path.write_text(json.dumps(document))
    other = kubeconfig.load(path)
    assert one.url == other.url == "https://api.test:6443"
    assert one.headers() == other.headers() == {"Authorization": "Bearer MARKED-SECRET"}
    assert "SECRET" not in repr(one)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("current-context: here", "current-context: there", "'there'"),
        ("cluster: c,", "cluster: d,", "'d'"),
        ("https://api.test:6443", "http://api.test:6443", "use https"),
        ("https://api.test:6443", "https://u:MARKED-SECRET@api.test", "no URL"),
        ("https://api.test:6443", "ftp://api.test", "no URL"),
        ("{token: MARKED-SECRET}", "{exec: {command: MARKED-SECRET}}", "plugin"),
        ("{token: MARKED-SECRET}", "{token: [MARKED-SECRET]}", "not a kubeconfig"),
        ("{token: MARKED-SECRET}", "{token: MARKED-SECRET", "not YAML"),
        ("{token: MARKED-SECRET}", "{client-certificate-data: MARKED-SECRET!}", "base64"),
        ("{token: MARKED-SECRET}", "{client-certificate-data: TUFSS0VE}", "PEM"),
        ("{token: MARKED-SECRET}", "{client-certificate: absent.pem}", "absent.pem"),
        (GOOD, "- MARKED-SECRET", "not a kubeconfig"),
        (GOOD, "!!python/object/apply:os.system ['touch pwned']", "not YAML"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, old: str, new: str, word: str) -> None:
    """One line with the file and what is wrong; nothing of it is quoted, and no tag of it is obeyed."""
    path = tmp_path / "kubeconfig"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(Config, match=word) as caught:
        kubeconfig.load(path)
    assert str(path.parent) in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)
