"""A port for ranks to meet at that nobody else takes in the seconds until one of them listens there."""

from __future__ import annotations

import socket


def hold() -> socket.socket:
    """A socket that keeps a free port of all this machine's addresses, ``getsockname()[1]``, until it is closed.

    It is bound and never listens. The kernel then gives the port to nobody who asks for any, or connects from any, but
    one who asks for this very port with SO_REUSEADDR, as torch's TCPStore does, may listen there.
    """
    if socket.has_dualstack_ipv6():
        held = socket.socket(socket.AF_INET6)
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    else:
        held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held
