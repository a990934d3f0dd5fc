"""Real vLLM servers, started once each and shared by all tests of this folder; without vLLM every test here
is skipped."""

from __future__ import annotations

import importlib.util

import pytest

from tests.vllm.servers import KINDS, Served, start


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed here; `make test-vllm` runs these in an environment of their own"
        for item in items:
            if "tests/vllm/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def all_served(request, tmp_path_factory):
    """Every kind that a selected test asks for; the servers start at the same time."""
    items = request.session.items
    specs = [item.callspec.params for item in items if hasattr(item, "callspec")]
    kinds = {spec["served"] for spec in specs if "served" in spec} | {KINDS[0]}
    if any("every_kind" in item.fixturenames for item in items):
        kinds = set(KINDS)
    served = {kind: start(kind, tmp_path_factory.mktemp(kind)) for kind in sorted(kinds)}
    yield served
    for one in served.values():
        one.process.end()
    for one in served.values():
        one.close()


@pytest.fixture(params=KINDS)
def served(request, all_served) -> Served:
    """Each kind in turn."""
    return all_served[request.param].connect()


@pytest.fixture
def one_served(all_served) -> Served:
    """A single worker."""
    return all_served[KINDS[0]].connect()


@pytest.fixture
def every_kind(all_served) -> dict[str, Served]:
    """All of them, for a program that connects to them by itself. The weights published last are forgotten:
    a test that follows publishes its own."""
    found = {kind: all_served[kind].connect() for kind in KINDS}
    yield found
    for served in found.values():
        served.publish(served.weights)
