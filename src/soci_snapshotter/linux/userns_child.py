"""The program of linux.userns: enters a new user namespace, says so, and ends with its input. No imports of ours."""

import ctypes
import os

_CLONE_NEWUSER = 0x10000000  # linux/sched.h


def main() -> None:
    """Write "+" when there, "-" when the kernel refused."""
    entered = ctypes.CDLL(None).unshare(_CLONE_NEWUSER) == 0
    os.write(1, b"+" if entered else b"-")
    os.read(0, 1)


if __name__ == "__main__":
    main()
