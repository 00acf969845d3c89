"""pytest tests/test_addresses.py"""

from __future__ import annotations

import pytest

from pvtcap.addresses import is_allowed, parse_networks
from pvtcap.errors import ConfigError


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1"),
        *("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "127.0.0.1.", "10.1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    ],
)
def test_private_addresses(host: str) -> None:
    assert not is_allowed(host, ())
    assert is_allowed(host, parse_networks([]))


@pytest.mark.parametrize(
    "host",
    ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "example.org", "127.0.0.1.nip.io", "8.8.2056", "a\0b", "é"],
)
def test_public_addresses_and_names(host: str) -> None:
    assert is_allowed(host, ())


def test_networks_by_name() -> None:
    networks = parse_networks(["127.0.0.1/8", "fd00::/8"])
    assert is_allowed("127.0.0.1", networks)
    assert is_allowed("::ffff:127.0.0.1", networks)
    assert is_allowed("fd00::1", networks)
    assert not is_allowed("169.254.169.254", networks)
    with pytest.raises(ConfigError, match=r"--allow-private-addresses: not a network"):
        parse_networks(["localhost"])
