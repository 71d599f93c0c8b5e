"""An empty store with the tables of governance."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "governance" / "gateway.db", SCHEMA)
    yield opened
    opened.close()
