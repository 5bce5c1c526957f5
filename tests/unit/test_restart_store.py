"""A metadata.sqlite that is not what it was: refused in one line that says what to do, and nothing is lost."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from soci_snapshotter.errors import Config
from soci_snapshotter.snapshotter.snapshotter import Snapshotter
from soci_snapshotter.store.artifacts import Artifacts
from soci_snapshotter.store.snapshots import Kind, SnapshotStore


def filled(root: Path) -> Path:
    """A store with enough rows for several pages; its file."""
    with Snapshotter(bytes(root)) as snapshots:
        for number in range(40):
            snapshots.prepare(f"k{number}", "", {"label": "x" * 500})
    return root / "metadata.sqlite"


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 20_000)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE snapshots (something TEXT)")
    db.close()


@pytest.mark.parametrize("spoil", [cut, garbage, overwritten, emptied, removed, newer, foreign])
def test_a_spoiled_store_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Twice, in one line that names the file; snapshots' directories stay; with the file back all is as it was."""
    path = filled(tmp_path)
    saved = tmp_path / "saved"
    shutil.copy(path, saved)
    spoil(path)
    content = path.read_bytes() if path.exists() else b""
    for _ in range(2):
        with pytest.raises(Config, match=re.escape(str(path))) as caught, Snapshotter(bytes(tmp_path)):
            pass
        text = str(caught.value)
        assert "\n" not in text
        assert "restore it from a backup" in text or "use the version that wrote it" in text
    if spoil is not removed and spoil is not emptied:
        assert path.read_bytes()[100:] == content[100:]  # sqlite may note in the header that it looked
    assert len(list((tmp_path / "snapshots").iterdir())) == 40
    for name in ("metadata.sqlite-wal", "metadata.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(saved, path)
    with Snapshotter(bytes(tmp_path)) as snapshots:
        assert len(list(snapshots.walk())) == 40
        assert snapshots.stat("k7").labels == {"label": "x" * 500}


def test_a_root_with_layers_needs_its_rows(tmp_path: Path) -> None:
    """What else there is in the root (layers, say) is a reason to miss the file, too."""
    with (
        pytest.raises(Config, match="missing or empty, but there is 3 layers"),
        Snapshotter(bytes(tmp_path), missed="3 layers"),
    ):
        pass
    with Snapshotter(bytes(tmp_path)) as snapshots:
        assert list(snapshots.walk()) == []


def test_damage_that_shows_later(tmp_path: Path) -> None:
    """A page that goes bad while the daemon runs: the call fails with the file's name, others go on."""
    path = filled(tmp_path)
    with SnapshotStore(bytes(path)) as store:
        store._db.execute("PRAGMA cache_size = 0").fetchall()
        overwritten(path)
        with pytest.raises(Config, match=re.escape(f"{path} is damaged")):
            store.create(store.reserve(), "new", parent="", kind=Kind.ACTIVE, labels={})


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    """The call fails in one line, and the next one is not spoiled by it."""
    path = filled(tmp_path)
    with SnapshotStore(bytes(path)) as store:
        store._db.execute("PRAGMA query_only = ON").fetchall()
        with pytest.raises(Config, match="may be written to"):
            store.remove("k1")
        assert store.get("k1").key == "k1"
        store._db.execute("PRAGMA query_only = OFF").fetchall()
        store.remove("k1")


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + bytes(4000)])
def test_spoiled_artifacts_are_refused_and_not_removed(tmp_path: Path, content: bytes) -> None:
    """They can be made again: the line says how; nobody does it unasked."""
    path = tmp_path / "content" / "artifacts.sqlite"
    path.parent.mkdir()
    path.write_bytes(content)
    with (
        pytest.raises(Config, match="remove the file, then make it again with: soci rebuild-db"),
        Artifacts(path),
    ):
        pass
    assert path.read_bytes() == content
