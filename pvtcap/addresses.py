"""Which IP addresses a download may connect to: public ones, and private networks that are allowed by name."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from pvtcap.errors import ConfigError

Network = IPv4Network | IPv6Network
EVERYTHING: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the IPv4 address is in the last 32 bits


def is_allowed(host: str, networks: Sequence[Network]) -> bool:
    """Whether ``host`` may be connected to. A name, not an address, is: what it resolves to is to be asked again.

    Loopback, link-local (169.254.169.254 among them), private, multicast and reserved addresses are not, unless in
    one of ``networks``; neither are IPv6 addresses that carry such an IPv4 address inside.
    """
    address = _address(host)
    if address is None:
        return True
    address = _embedded(address)
    public = address.is_global and not address.is_multicast
    return public or any(address in network for network in networks)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    """None: a name. ``127.1`` and ``0x7f000001`` are addresses, too: older aiohttps connect there and ask nobody."""
    try:
        return ip_address(host.split("%")[0])  # fe80::1%eth0
    except ValueError:
        try:
            return IPv4Address(socket.inet_aton(host.rstrip(".")))
        except (OSError, ValueError):
            return None


def parse_networks(words: Sequence[str]) -> tuple[Network, ...]:
    """Networks such as ``127.0.0.0/8``; none at all means every one. Raises ConfigError."""
    try:
        return tuple(ip_network(word, strict=False) for word in words) or EVERYTHING
    except ValueError as error:
        raise ConfigError(
            "not a network", where="--allow-private-addresses", got=error, wanted="10.0.0.0/8, for example"
        ) from None


def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)
