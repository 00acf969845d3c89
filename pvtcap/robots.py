"""What a site says in a response's headers about the use of its photos by machines."""

from __future__ import annotations

from multidict import CIMultiDict, CIMultiDictProxy

OUR_NAME = "pvtcap"
# noai and noimageai: spawning.ai, DeviantArt; the others: https://developers.google.com/search/docs/crawling-indexing
_FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


def forbidding_directive(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> str | None:
    """The header that forbids us the photo, or None.

    ``X-Robots-Tag`` holds directives, all of them for everyone or, behind a name and a colon, for one robot;
    ``TDM-Reservation: 1`` reserves text and data mining (W3C TDM Reservation Protocol).
    """
    for value in headers.getall("X-Robots-Tag", ()):
        robot = "*"
        for word in value.lower().split(","):
            name, colon, rest = word.partition(":")
            if colon and name.strip() not in _WITH_VALUE:
                robot, word = name.strip(), rest
            if robot in ("*", OUR_NAME) and word.strip() in _FORBIDDING:
                return f"X-Robots-Tag: {value}"
    if headers.get("TDM-Reservation", "").strip() == "1":
        return "TDM-Reservation: 1"
    return None
