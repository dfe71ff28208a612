"""Offline, derandomised, and a tiny checkpoint of every family for whoever asks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # before anything imports torch: threads of several workers would wait for each other

import pytest
from hypothesis import settings
from tiny import NAMES, tiny_source

settings.register_profile("ci", deadline=None, derandomize=True)  # the first torch call alone takes longer than a deadline
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """Where the tiny checkpoints of this run are built."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=NAMES, scope="session")
def any_tiny(request, tiny_cache):
    """A source of every family in turn."""
    return tiny_source(request.param, tiny_cache)


@pytest.fixture(scope="session")
def llama(tiny_cache):
    """The tiny twin of Llama-3-8B: 32 layers, untied, three shards."""
    return tiny_source("llama3-8b", tiny_cache)


@pytest.fixture
def copy_of(tmp_path):
    """A function that makes a copy of a source folder to be damaged."""
    import shutil

    def copy(source):
        target = tmp_path / "damaged"
        shutil.copytree(source.folder, target)
        return target

    return copy
