"""A fake backend and a gateway process in front of it, shared by the tests of a module."""

import sys
from collections.abc import Iterator

import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[FakeUpstream]:
    server = FakeUpstream(("tiny", "org/nested/name")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(shared_upstream: FakeUpstream) -> Iterator[RunningGateway]:
    settings = Settings(max_body_bytes=8 * 1024 * 1024, probe_interval_s=0.1, read_timeout_s=2.0)
    backend = Backend("a", shared_upstream.url, "utility", model_names={"renamed": "tiny"})
    with RunningGateway(backend, settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def claude() -> Iterator[FakeAnthropic]:
    """A strict server of Anthropic's API."""
    server = FakeAnthropic().start()
    yield server
    server.stop()


@pytest.fixture
def usual_depth() -> Iterator[None]:
    """As many calls inside each other as Python allows where nobody asks for more; torch's compiler does, for good."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.fixture
def upstream(shared_upstream: FakeUpstream) -> FakeUpstream:
    """The shared backend with empty books."""
    shared_upstream.books = Books()
    shared_upstream.healthy = True
    return shared_upstream
