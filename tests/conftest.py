"""What every test gets."""

import logging
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
