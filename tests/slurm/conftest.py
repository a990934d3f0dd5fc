"""One real SLURM for all tests of this folder."""

import pytest

from tests.slurm.cluster import slurm, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        print(f"SLURM's tests do not run: {reason}")
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm"), num_nodes=2) as environment:
        yield environment
