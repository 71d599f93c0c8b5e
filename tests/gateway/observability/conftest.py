"""A fake backend with empty books for each test."""

from collections.abc import Iterator

import pytest

from tests.gateway.upstream import FakeUpstream


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    server = FakeUpstream().start()
    yield server
    server.stop()
