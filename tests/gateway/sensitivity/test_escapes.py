"""An address behind an escape in a text: hidden where it is certain where it begins, kept at home where it is not."""

import json

import pytest

from tests.gateway.sensitivity.searching import clear
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (r"to \nbob@example.com", r"to \n[EMAIL_1]"),
        (r"to \u0020bob@example.com", r"to \u0020[EMAIL_1]"),
        (r"to \u003abob@example.com", r"to \u003a[EMAIL_1]"),
        (r'"a\"bob@example.com', r'"a\"[EMAIL_1]'),
        ("to -bob@example.com", "to -[EMAIL_1]"),
        # The escape stands for what may belong to a name.
        (r"to \u0041bob@example.com", None),
        (r"to \u00e9bob@example.com", None),
        (r"to \u005fbob@example.com", None),
        # Who knows what is read in the end.
        (r"to \.bob@example.com", None),
        (r"to \\bob@example.com", None),
        (r"to \\\\nbob@example.com", None),
    ],
)
def test_what_stands_behind_an_escape(text: str, hidden: str | None) -> None:
    clearance = clear(SensitivitySettings(default="redact"), json.dumps({"prompt": text}).encode())
    assert clearance.kinds == {"email": 1}
    if hidden is None:
        assert (clearance.action, "no placeholder can stand" in clearance.why) == ("stay", True)
    else:
        assert clearance.hidden is not None
        assert json.loads(clearance.hidden.raw)["prompt"] == hidden
