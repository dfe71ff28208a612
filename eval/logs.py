"""What other libraries say without cause."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unsaid(logger: str, *parts: str) -> Iterator[None]:
    """Inside, messages of `logger` that contain one of `parts` are not shown; all others are."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in parts)

    found = logging.getLogger(logger)
    found.addFilter(wanted)
    try:
        yield
    finally:
        found.removeFilter(wanted)
