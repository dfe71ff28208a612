"""A process that has imported everything, for all tests of this folder."""

import pytest
from faults.harness import Warm


@pytest.fixture(scope="session")
def warm():
    """Starts scripts in a blink."""
    process = Warm()
    yield process
    process.close()
