"""FUSE messages against the sizes and layouts of linux/fuse.h."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats import fusemsg

u64 = st.integers(0, 2**64 - 1)


@given(u64, u64, u64, st.integers(0, 2**32 - 1))
def test_a_read_is_understood(node: int, unique: int, offset: int, size: int) -> None:
    """Both views of a READ, the full one and the loop's, agree."""
    message = fusemsg.read_request(node, unique, offset, size)
    header = fusemsg.request(message, len(message))
    assert (header.opcode, header.node, header.unique) == (15, node, unique)
    assert fusemsg.read_in(message) == (offset, size)
    assert fusemsg.PEEK.unpack_from(message) == (80, 15, unique, node, offset, size)


@pytest.mark.parametrize("length", [0, 39, 41])
def test_a_request_of_another_length_is_refused(length: int) -> None:
    """The header's length is checked against what was read."""
    with pytest.raises(Integrity):
        fusemsg.request(struct.pack("=IIQQIIIHH", 40, 1, 1, 1, 0, 0, 0, 0, 0) + b"x", length)


def test_replies_have_the_kernels_sizes() -> None:
    """Each structure is as long as the kernel's, header included."""
    assert len(fusemsg.entry_out(16, 0o100400, 512)) == 128
    assert len(fusemsg.attr_out(16, 0o100400, 512)) == 104
    assert len(fusemsg.open_out(1)) == 16
    assert len(fusemsg.statfs_out()) == 80
    assert fusemsg.reply(7, b"abc") == struct.pack("=IiQ", 19, 0, 7) + b"abc"
    assert fusemsg.error_reply(7, 5) == struct.pack("=IiQ", 16, -5, 7)
    assert fusemsg.notification(7) == struct.pack("=IiQ", 16, 7, 0)


def test_init_takes_of_what_is_wanted_what_is_offered() -> None:
    """An old kernel's answer has no RESEND, a new one's has; passthrough is offered and not taken."""
    new = struct.pack("=IIIII", 7, 45, 131072, 1 | 1 << 22 | 1 << 30, 1 << 7 | 1 << 5) + bytes(44)
    answer = fusemsg.init_reply(fusemsg.init_request(new))
    assert len(answer) == 64
    init = fusemsg.Init
    assert (
        fusemsg.init_reply_flags(answer) == init.ASYNC_READ | init.MAX_PAGES | init.INIT_EXT | init.HAS_RESEND
    )
    old = struct.pack("=IIIII", 7, 31, 131072, 1, 1 << 7) + bytes(44)
    assert fusemsg.init_reply_flags(fusemsg.init_reply(fusemsg.init_request(old))) == init.ASYNC_READ


def test_a_kernel_before_5_17_is_understood() -> None:
    """Its INIT has 16 bytes: no second word of capabilities, so no RESEND."""
    asked = fusemsg.init_request(struct.pack("=IIII", 7, 34, 131072, 1 | 1 << 17))
    assert (asked.minor, asked.max_readahead) == (34, 131072)
    init = fusemsg.Init
    assert fusemsg.init_reply_flags(fusemsg.init_reply(asked)) == init.ASYNC_READ | init.NO_OPEN_SUPPORT


def test_invalidations_are_as_the_kernel_reads_them() -> None:
    """Length, code, no unique; then the structures of linux/fuse.h, a name with its NUL."""
    entry = fusemsg.invalidate_entry(1, b"m12")
    assert entry == struct.pack("=IiQQII", 16 + 16 + 4, 3, 0, 1, 3, 0) + b"m12\0"
    assert fusemsg.invalidate_attributes(2**63 + 5) == struct.pack("=IiQQqq", 40, 2, 0, 2**63 + 5, -1, 0)


def test_a_strange_init_is_refused() -> None:
    """Another major version, and a message that is cut off."""
    with pytest.raises(Unsupported):
        fusemsg.init_request(struct.pack("=IIIII", 8, 0, 0, 0, 0))
    with pytest.raises(Integrity):
        fusemsg.init_request(b"\7\0\0\0")
    with pytest.raises(Integrity):
        fusemsg.init_reply_flags(b"short")
