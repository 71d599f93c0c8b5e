"""The search of a request without a server around it."""

import asyncio

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.sensitivity.clearance import Clearance
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings


def exchange_of(body: bytes, principal: Principal | None = None, **headers: str) -> Exchange:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    made = Exchange("/v1/chat/completions", raw, body, body=Body(body), model="m", request_id="r", forward=raw)
    made.principal = principal
    return made


def clear(settings: SensitivitySettings, body: bytes, **headers: str) -> Clearance:
    return asyncio.run(Detector(settings).clear(exchange_of(body, **headers)))
