"""What is believed of a layer's files after a killed process, a power loss and a failing disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.store import layerfiles
from soci_snapshotter.store.layerfiles import LayerRecord, SpanFile

BOOT, NEXT = b"a" * 36, b"b" * 36


def opened(directory: Path, boot: bytes = BOOT) -> SpanFile:
    """Four spans of 512 bytes."""
    return SpanFile(directory, 4, 2048, boot)


def test_marks_survive_a_killed_process(tmp_path: Path) -> None:
    """Within one boot a mark written without any sync is believed."""
    with opened(tmp_path) as files:
        files.write(1, 512, memoryview(b"x" * 512))
    with opened(tmp_path) as files:
        assert bytes(files.live) == b"\0\1\0\0"
        assert os.pread(files.fd, 512, 512) == b"x" * 512


def test_marks_do_not_survive_a_power_loss(tmp_path: Path) -> None:
    """In the next boot only what was made durable is believed."""
    with opened(tmp_path) as files:
        files.write(0, 0, memoryview(b"x" * 512))
        assert files.make_durable() == 1
        files.write(1, 512, memoryview(b"y" * 512))
    with opened(tmp_path, NEXT) as files:
        assert bytes(files.live) == b"\1\0\0\0"
    with opened(tmp_path, NEXT) as files:
        assert bytes(files.live) == b"\1\0\0\0"


def test_a_torn_durable_file_is_not_believed(tmp_path: Path) -> None:
    """One flipped byte: every span is fetched again."""
    with opened(tmp_path) as files:
        files.write(0, 0, memoryview(b"x" * 512))
        files.make_durable()
    path = tmp_path / "spans.durable"
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)
    with opened(tmp_path, NEXT) as files:
        assert bytes(files.live) == bytes(4)


def test_a_failed_write_back_takes_marks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fdatasync failed: the marks since the last success are gone, in memory and on disk."""
    with opened(tmp_path) as files:
        files.write(0, 0, memoryview(b"x" * 512))
        files.make_durable()
        files.write(2, 1024, memoryview(b"y" * 512))

        def failing(fd: int) -> None:
            raise OSError(5, "I/O error")

        monkeypatch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="I/O error"):
            files.make_durable()
        monkeypatch.undo()
        assert bytes(files.live) == b"\1\0\0\0"
        assert files.epoch == 1
    with opened(tmp_path) as files:
        assert bytes(files.live) == b"\1\0\0\0"


def test_whole_after_a_failed_write_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is whole in the epoch whose marks are all there: not before the last span, nor later by itself."""
    with opened(tmp_path) as files:
        for span in range(4):
            assert files.whole() == -1
            files.write(span, 512 * span, memoryview(b"x" * 512))
        assert files.whole() == files.epoch == 0

        def failing(fd: int) -> None:
            raise OSError(5, "I/O error")

        monkeypatch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="I/O error"):
            files.make_durable()
        monkeypatch.undo()
        assert (files.whole(), files.epoch) == (-1, 1)
        for span in range(4):
            files.write(span, 512 * span, memoryview(b"x" * 512))
        assert files.whole() == 1


def test_a_table_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """spans.durable could not be written: what is not durable stays counted, so that the next round sees to it."""

    def failing(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as files:
        files.write(0, 0, memoryview(b"x" * 512))
        monkeypatch.setattr(layerfiles, "write_atomically", failing)
        with pytest.raises(OSError, match="No space"):
            files.make_durable()
        monkeypatch.undo()
        assert files.unsynced == 512
        assert files.make_durable() == 1
        assert files.unsynced == 0


def test_marks_of_another_shape_are_dropped(tmp_path: Path) -> None:
    """A file for another number of spans says nothing."""
    with opened(tmp_path) as files:
        files.write(0, 0, memoryview(b"x" * 512))
    with SpanFile(tmp_path, 5, 2560, BOOT) as files:
        assert bytes(files.live) == bytes(5)


def test_records_round_trip_and_are_checked(tmp_path: Path) -> None:
    """layer.json comes back as written; in another layer's directory, or broken, it is refused."""
    layer, ztoc = digests.sha256(b"layer"), digests.sha256(b"ztoc")
    directory = layerfiles.layer_directory(tmp_path, layer, ztoc)
    directory.mkdir(parents=True)
    with pytest.raises(NotFound):
        layerfiles.read_record(directory)
    record = LayerRecord(str(layer), str(ztoc), 99, 2048, ("r.example.com/a:1",), {"h": 3})
    layerfiles.write_record(directory, record)
    assert layerfiles.read_record(directory) == record
    assert list(layerfiles.scan(tmp_path)) == [directory]
    assert record.with_source("b").sources == ("b", "r.example.com/a:1")
    assert record.with_shown("g", 4, 4, 0, local=False).without_mount(3).mounts == {"g": 4}
    layerfiles.write_record(directory, LayerRecord(str(ztoc), str(layer), 1, 0, (), {}))
    with pytest.raises(Integrity):
        layerfiles.read_record(directory)


def test_a_closed_layer_is_not_synced(tmp_path: Path) -> None:
    """make_durable after close touches no descriptor: its number may be another file's. Closing twice is harmless."""
    files = opened(tmp_path)
    files.write(0, 0, memoryview(b"x" * 512))
    files.close()
    with open(tmp_path / "other", "w+b") as other:
        assert files.make_durable() == 0
        files.close()
        assert os.fstat(other.fileno()).st_size == 0
    assert not (tmp_path / "spans.durable").exists()


def test_a_data_tar_that_changed_meanwhile_is_filled_afresh(tmp_path: Path) -> None:
    """Cut, grown, emptied or written to while nobody had it open: no mark is believed and no old byte is left."""

    def cut(path: Path) -> None:
        os.truncate(path, 1024)

    def grown(path: Path) -> None:
        os.truncate(path, 1 << 30)

    def emptied(path: Path) -> None:
        os.truncate(path, 0)

    def written(path: Path) -> None:
        with open(path, "r+b") as file:
            file.write(b"z")

    def swapped(path: Path) -> None:
        status, data = path.stat(), path.read_bytes()
        path.rename(path.with_name("kept"))
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    for number, change in enumerate((cut, grown, emptied, written, swapped)):
        directory = tmp_path / str(number)
        directory.mkdir()
        with opened(directory) as files:
            for span in range(4):
                files.write(span, 512 * span, memoryview(b"x" * 512))
            files.make_durable()
        change(directory / "data.tar")
        with opened(directory) as files:
            assert bytes(files.live) == bytes(4), change.__name__
            assert os.pread(files.fd, 4096, 0) == bytes(2048), change.__name__
        with opened(directory, NEXT) as files:
            assert bytes(files.live) == bytes(4), change.__name__


def test_a_cut_file_is_seen_after_a_crash(tmp_path: Path) -> None:
    """Nothing was closed in order, so only the size speaks: marks go."""
    files = opened(tmp_path)
    files.write(3, 1536, memoryview(b"x" * 512))
    os.truncate(tmp_path / "data.tar", 1600)
    with opened(tmp_path) as again:
        assert bytes(again.live) == bytes(4)
    files.close()


def test_what_follows_the_tars_end_is_kept(tmp_path: Path) -> None:
    """The last span's bytes reach behind the tar; how far is known after a crash, and after a power loss if durable."""
    with opened(tmp_path) as files:
        assert files.tar_size == 0
        files.write(3, 1536, memoryview(b"x" * 512 + b"y" * 700))
        assert files.tar_size == 2748
    with opened(tmp_path) as files:
        assert files.tar_size == 2748
        assert os.pread(files.fd, 4096, 2048) == b"y" * 700
    with opened(tmp_path, NEXT) as files:
        assert files.tar_size == 0
    with opened(tmp_path) as files:
        files.write(3, 1536, memoryview(b"x" * 500))
        files.make_durable()
    with opened(tmp_path, NEXT) as files:
        assert (files.tar_size, bytes(files.live)) == (2036, b"\0\0\0\1")
