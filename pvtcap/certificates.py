"""Why a server's certificate was refused, and what its user can do about it.

    if (refusal := refused(error)) is not None:
        raise ShardError(refusal.why, where=url, do=refusal.do)

OpenSSL looks for the authorities it trusts where ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` say, or where it was built to;
a file that is not there it passes over without a word.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OPENSSL_VARIABLE = "SSL_CERT_FILE"
# Of OpenSSL's x509_vfy.h.
_TIMES = frozenset({9, 10})  # not yet valid, expired
_NAMES = frozenset({62, 64})  # of another host, of another IP address
_UNKNOWN_AUTHORITY = frozenset({18, 19, 20, 21})


class Refusal(NamedTuple):
    """``why`` in a few words; ``do`` is None where only the server's owner can help."""

    why: str
    do: str | None


def refused(error: BaseException, variable: str = OPENSSL_VARIABLE) -> Refusal | None:
    """The certificate's refusal that ``error`` is or was made of; None if it is about something else.

    ``variable`` is where the client at hand wants to be told of a private authority.
    """
    missing = _missing(variable)
    for below in _chain(error):
        # OpenSSL passes its own over; botocore stumbles over it, and does not say so.
        if missing and variable != OPENSSL_VARIABLE and isinstance(below, OSError) and below.errno == errno.ENOENT:
            return Refusal("the authority's certificate is not there", missing)
        # aiohttp's own error is of this class, too, and has none of its attributes.
        if isinstance(below, ssl.SSLCertVerificationError) and hasattr(below, "verify_code"):
            return Refusal(
                f"its certificate is refused: {below.verify_message.rstrip('.')}", _do(below.verify_code, variable)
            )
    return None


def knows_authorities() -> bool:
    """Whether this machine has any authority to compare with: small container images have none."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile is not None or (paths.capath is not None and any(Path(paths.capath).iterdir()))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those below it. botocore raises its own while it handles aiohttp's, and names no cause."""
    below: BaseException | None = error
    while below is not None:
        yield below
        below = below.__cause__ or below.__context__


def _missing(variable: str) -> str | None:
    given = os.environ.get(variable)
    return f"{variable} says {given}, and there is no such file." if given and not Path(given).is_file() else None


def _do(code: int, variable: str) -> str | None:
    if code in _TIMES:
        return "Is this machine's clock right? Then its owner has to renew it."
    if code in _NAMES:
        return "Use a name that the certificate has."
    if code not in _UNKNOWN_AUTHORITY:
        return None
    if (missing := _missing(variable)) is not None:
        return missing
    if variable == OPENSSL_VARIABLE and not knows_authorities():  # botocore brings a list of its own
        return f"This machine knows no authority at all: install ca-certificates, or set {variable}."
    return f"If it is of a private authority, set {variable} to a file with that one's certificate (PEM)."
