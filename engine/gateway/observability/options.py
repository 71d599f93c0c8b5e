"""What a gateway process is told about observability."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """See the fields of `section.Observability`.

    Attributes:
        request_log: Whether to write one line of JSON per request.
        log_bodies: Whether these lines hold the requests' bodies.
        traces: URL of the OTLP collector; None: no traces.
        trace_share: Share of the requests to trace, 0 to 1.
        open_metrics: Whether `/metrics` answers everybody.
        accounts: Most teams, and apps, with series of their own.
        shared: Folder in which the workers of one gateway leave their figures for each other; None: one worker.
    """

    request_log: bool = False
    log_bodies: bool = False
    traces: str | None = None
    trace_share: float = 1.0
    open_metrics: bool = True
    accounts: int = 50
    shared: str | None = None
