"""The table of indexes: order, merging, versions, other processes, damage."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from soci_snapshotter.errors import Config
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.sociindex import INDEX_V1
from soci_snapshotter.store.artifacts import Artifacts, IndexRecord


def _record(number: int, **changes: object) -> IndexRecord:
    fields: dict[str, object] = {
        "digest": digests.sha256(b"%d" % number),
        "store": "soci",
        "namespace": "default",
        "image_digest": digests.sha256(b"image"),
        "image_name": "docker.io/library/x:1",
        "platform": "linux/amd64",
        "media_type": INDEX_V1,
        "size": 1000 + number,
        "created_ns": number,
    }
    return IndexRecord(**(fields | changes))  # type: ignore[arg-type]


def test_records_come_back_newest_first(tmp_path: Path) -> None:
    """What was added is there after a restart, in order of time, whatever store or namespace."""
    records = [_record(1), _record(3, store="containerd"), _record(2, namespace="k8s.io")]
    with Artifacts(tmp_path / "a.sqlite") as artifacts:
        for record in records:
            artifacts.add(record, only=False)
    with Artifacts(tmp_path / "a.sqlite") as artifacts:
        assert artifacts.all() == [records[1], records[2], records[0]]
        assert artifacts.of_image(records[0].image_digest, "soci", "default") == [records[0]]


def test_only_forgets_the_others_of_the_image(tmp_path: Path) -> None:
    """`only` forgets the same image's in the same store and namespace, and no others."""
    other = digests.sha256(b"other")
    kept = [_record(1, store="containerd"), _record(2, namespace="k8s.io"), _record(3, image_digest=other)]
    with Artifacts(tmp_path / "a.sqlite") as artifacts:
        for record in (*kept, _record(4)):
            artifacts.add(record, only=False)
        artifacts.add(_record(5), only=True)
        assert artifacts.all() == [_record(5), *reversed(kept)]


def test_update_adds_what_is_missing(tmp_path: Path) -> None:
    """Merging keeps a record that is there as it is, adds the others and forgets the ones named."""
    with Artifacts(tmp_path / "a.sqlite") as artifacts:
        artifacts.add(_record(1), only=False)
        artifacts.add(_record(2), only=False)
        artifacts.update([_record(1, image_name="other"), _record(3)], [_record(2, size=0)])
        assert artifacts.all() == [_record(3), _record(1)]
        artifacts.remove(_record(3).digest, "containerd", "default")  # not in that store
        artifacts.remove(_record(1).digest, "soci", "default")
        assert artifacts.all() == [_record(3)]


def _add_many(path: Path, first: int) -> None:
    for number in range(first, first + 20):
        with Artifacts(path) as artifacts:
            artifacts.add(_record(number), only=False)


def test_several_processes_make_and_fill_one_table(tmp_path: Path) -> None:
    """Four processes that open a new database at once all get their records into it."""
    context = multiprocessing.get_context("fork")
    path = tmp_path / "a.sqlite"
    workers = [context.Process(target=_add_many, args=(path, 100 * n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    with Artifacts(path) as artifacts:
        assert len(artifacts.all()) == 80


def test_first_version_is_still_read(tmp_path: Path) -> None:
    """A database as the first release made it opens with what is in it."""
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(
            "CREATE TABLE indexes (digest TEXT NOT NULL, store TEXT NOT NULL, namespace TEXT NOT NULL,"
            " image_digest TEXT NOT NULL, image_name TEXT NOT NULL, platform TEXT NOT NULL, media_type TEXT NOT"
            " NULL, size INTEGER NOT NULL, created_ns INTEGER NOT NULL, PRIMARY KEY (digest, store, namespace))"
            " WITHOUT ROWID; CREATE INDEX indexes_by_image ON indexes (image_digest, store, namespace);"
            " PRAGMA user_version = 1;"
        )
        db.execute("INSERT INTO indexes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", dataclasses.astuple(_record(7)))
    db.close()
    with Artifacts(path) as artifacts:
        assert artifacts.all() == [_record(7)]


def test_newer_version_is_left_alone(tmp_path: Path) -> None:
    """A database of a later release is refused by name and not changed."""
    path = tmp_path / "a.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(Config, match=r"a\.sqlite.*newer.*99"), Artifacts(path):
        pass
    assert path.read_bytes() == before


def test_damage_says_how_to_mend_it(tmp_path: Path) -> None:
    """A file that is no database: the error names it and the command that makes it anew."""
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"no database" * 500)
    with pytest.raises(Config, match=r"a\.sqlite.*rebuild-db"), Artifacts(path):
        pass


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    """A path below a file: the error names it and --root."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(Config, match=r"file/content/a\.sqlite.*--root"),
        Artifacts(tmp_path / "file/content/a.sqlite"),
    ):
        pass
