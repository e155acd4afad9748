"""Shared by the tests of commands: each runs in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative paths (`sweep`, `run`) are in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def file_cache(tmp_path_factory):
    """The cache folder of a test file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def one_cache(own_cache, monkeypatch, file_cache):
    """For `usefixtures`: teachers are trained once for all tests of the file."""
    monkeypatch.setenv("JDISTILL_CACHE", str(file_cache))
    return file_cache
