"""pytest tests/test_robots.py"""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from pvtcap.robots import forbidding_directive


@pytest.mark.parametrize(
    ("headers", "forbidden"),
    [
        ([("X-Robots-Tag", "noai")], True),
        ([("x-robots-tag", "nofollow, NoImageAI")], True),
        ([("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "noindex")], True),
        ([("X-Robots-Tag", "unavailable_after: 25 Jun 2010 15:00:00 PST, noai")], True),
        ([("X-Robots-Tag", "pvtcap: noindex")], True),
        ([("X-Robots-Tag", "*: none")], True),
        ([("TDM-Reservation", "1")], True),
        ([], False),
        ([("X-Robots-Tag", "all")], False),
        ([("X-Robots-Tag", "googlebot: noindex, noai")], False),
        ([("X-Robots-Tag", "max-snippet: 3, nofollow")], False),
        ([("X-Robots-Tag", "googlebot: noindex, pvtcap: noai")], True),
        ([("TDM-Reservation", "0")], False),
    ],
)
def test_what_sites_say(headers: list[tuple[str, str]], forbidden: bool) -> None:
    assert (forbidding_directive(CIMultiDict(headers)) is not None) is forbidden
