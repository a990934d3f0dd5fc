"""Worker processes that a trainer publishes to."""

import pytest

from tests.resharding.fakes import WorkerGroup


@pytest.fixture(scope="module")
def workers():
    """Two worker processes."""
    group = WorkerGroup(2)
    yield group
    group.stop()


@pytest.fixture
def group(workers):
    workers.log.clear()
    workers.errors.clear()
    return workers
