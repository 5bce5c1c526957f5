"""What every test gets."""

import logging
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command sets up logging for its process; the next test finds none of it."""
    ours, root = logging.getLogger("soci_snapshotter"), logging.getLogger()
    level, root_level, handlers = ours.level, root.level, list(root.handlers)
    yield
    ours.setLevel(level)
    root.setLevel(root_level)
    root.handlers[:] = handlers


def pytest_configure() -> None:
    """A shell that starts the suite in the background has SIGINT ignored, and every program that a test starts would
    inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
