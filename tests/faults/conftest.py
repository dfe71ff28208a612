"""A process that has imported everything, and what commands work on, for all tests of this folder."""

import pytest
from faults.commands import write_inputs
from faults.harness import Warm


@pytest.fixture(scope="session")
def warm():
    """Starts scripts in a blink."""
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def commands_inputs(tmp_path_factory, tiny_cache):
    """What `faults.commands.commands` work on."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, tiny_cache)
    return folder
