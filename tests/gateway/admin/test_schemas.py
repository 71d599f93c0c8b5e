"""Both OpenAPI documents, fuzzed with schemathesis against real workers: no server error, answers as documented."""

import json
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests.gateway.workers import MASTER_KEY, Workers

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
SETTINGS = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/openapi.json", "/admin/openapi.json"])
def test_no_generated_request_breaks_an_endpoint(workers: Workers, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(json.loads(workers.send("GET", path)[2]))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    with requests.Session() as session:
        fuzz_all(operations, mode, workers.url, session)


def fuzz_all(operations: list[Any], mode: GenerationMode, url: str, session: requests.Session) -> None:
    """Sends generated requests to every operation."""
    headers = {"Authorization": f"Bearer {MASTER_KEY}"}
    for operation in operations:
        raw = operation.definition.raw
        if (
            mode is GenerationMode.NEGATIVE
            and "requestBody" not in raw
            and not any(one["in"] == "query" for one in raw.get("parameters", ()))
        ):
            continue  # nothing in it can be wrong: any text will do in a path

        @SETTINGS
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: Any) -> None:
            case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, session=session)

        fuzz()
