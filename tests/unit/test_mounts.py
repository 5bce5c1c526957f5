"""Reading the mount table."""

from soci_snapshotter.linux.mounts import parse_mountinfo


def test_mountinfo_lines_are_parsed() -> None:
    """Octal escapes are undone, optional fields skipped, lines of another form left out."""
    data = (
        b"42 27 0:39 / /tmp/a\\040b\\134 ro,relatime shared:1 master:2 - erofs /x/meta\\012 ro,directio\n"
        b"nonsense\n"
        b"43 27 0:40 / /m rw - tmpfs tmpfs rw\n"
    )
    first, second = parse_mountinfo(data)
    assert (first.mount_id, first.device, first.target, first.source) == (
        42,
        "0:39",
        b"/tmp/a b\\",
        b"/x/meta\n",
    )
    assert (first.fstype, first.super_options, second.target) == (b"erofs", b"ro,directio", b"/m")
