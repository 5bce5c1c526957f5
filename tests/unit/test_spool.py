"""What building a ztoc puts aside comes back as it was, and a full disk is named."""

from __future__ import annotations

import errno
import resource
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.index import spool
from soci_snapshotter.index.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def files_of_a_page() -> Iterator[None]:
    """No file may grow beyond 4 KiB: what a full disk is to a program, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(st.lists(st.binary(max_size=200)), st.sampled_from([1, 100, 1 << 20]))
def test_strings_come_back_in_both_directions(strings: list[bytes], in_memory: int) -> None:
    """Whether they stayed in memory or went to a file, forwards and backwards they are what was put there."""
    before, spool.IN_MEMORY = spool.IN_MEMORY, in_memory
    try:
        kept = Spool()
    finally:
        spool.IN_MEMORY = before
    for string in strings:
        kept.append(string)
    assert list(kept) == strings
    assert list(reversed(kept)) == strings[::-1]
    assert list(kept) == strings
    assert kept.size == sum(map(len, strings))
    kept.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """A killed process leaves nothing in the directory that had the bytes."""
    kept = Spool(tmp_path)
    kept.append(bytes(2 * spool.IN_MEMORY))
    assert list(tmp_path.iterdir()) == []
    assert [len(each) for each in kept] == [2 * spool.IN_MEMORY]
    kept.close()


@pytest.mark.usefixtures("files_of_a_page")
def test_a_full_disk_names_the_directory(tmp_path: Path) -> None:
    """The system's error says where there is no room, and closing afterwards raises nothing."""
    kept = Spool(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        kept.append(bytes(2 * spool.IN_MEMORY))
    assert caught.value.errno == errno.EFBIG
    kept.close()
