"""Prepare and release of a layer, cut off before each change they make to the disk or the mount table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.test_openlayers import TRUE, Mounter, World

CHANGES = ("fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir", "link", "ftruncate", "pwrite")
CUT_OFF = 9


@dataclass
class Kept(Mounter):
    """A mount table that outlives the process."""

    path: Path = Path()

    def mount(self, meta: Path, device: bytes, target: Path) -> None:
        super().mount(meta, device, target)
        self._save()

    def unmount(self, target: Path) -> None:
        super().unmount(target)
        self._save()

    def load(self) -> None:
        """What the process before left."""
        if self.path.exists():
            found = json.loads(self.path.read_text())
            self.table = {Path(target): bytes.fromhex(device) for target, device in found.items()}

    def _save(self) -> None:
        self.path.write_text(json.dumps({str(target): device.hex() for target, device in self.table.items()}))


def node(top: Path) -> World:
    """A node over this directory, as the process before left it."""
    (top / "root").mkdir(exist_ok=True)
    mounter = Kept(path=top / "mounts")
    mounter.load()
    return World(top / "root", mounter=mounter)


def cut_off(top: Path, step: int, begin: Callable[[World], None], work: Callable[[World], None]) -> bool:
    """Run `work` in a process that ends before change number `step`; False when it has fewer changes than that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CUT_OFF
    try:
        world = node(top)
        begin(world)
        world.start()
        left = step

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                nonlocal left
                if left == 0:
                    os._exit(CUT_OFF)
                left -= 1
                return function(*arguments, **keywords)

            return call

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        for name in ("mount", "unmount"):
            setattr(world.mounter, name, counted(getattr(world.mounter, name)))
        work(world)
        os._exit(0)
    except BaseException:
        os._exit(1)


def nothing_left(world: World) -> None:
    """No layer, mount, mount point or temporary file."""
    assert list(world.root.glob("layers/*")) == []
    assert world.mounter.table == {} and list(world.root.glob("m/*")) == []
    assert list(world.root.rglob("*.tmp")) == [] and list(world.root.glob("content/ingest/*")) == []


@pytest.mark.parametrize("how", ["prepare", "release", "release while open"])
def test_cut_off_before_each_change(tmp_path: Path, how: str) -> None:
    """No row stands for the layer (it is not committed yet, or removed already): the next start leaves nothing of it, and
    a new Prepare works; a node that somebody has open stays served until it is closed."""
    step = 0
    while True:
        top = tmp_path / str(step)
        top.mkdir()
        number = 0
        if how != "prepare":
            first = node(top)
            first.start()
            number = first.prepare(TRUE)
            first.stop()
            keys, rows = first.keys, first.book.rows

        def known(world: World) -> None:
            if how != "prepare":
                world.keys, world.book.rows = dict(keys), list(rows)  # noqa: B023 - called at once

        def work(world: World) -> None:
            if how == "prepare":
                world.prepare(TRUE)
            else:
                world.layers.release(number)  # noqa: B023 - called at once
                world.release_fuse()

        was_cut = cut_off(top, step, known, work)
        world = node(top)
        if how == "release while open":
            record = next(iter(top.glob("root/layers/*/*/layer.json")), None)
            world.server.used = {json.loads(record.read_bytes())["node_id"]} if record else set()
        world.start()
        if world.server.used and world.server.files:
            assert set(world.server.files) == world.server.used
            assert world.mounter.table == {}
            world.release_fuse()
        nothing_left(world)
        again = world.prepare(TRUE)
        assert world.layers.lowerdir(again) in world.mounter.table
        world.stop()
        if not was_cut:
            break
        step += 1
    assert step > 3
