"""Addresses as they are printed, and as the commands accept them."""

import pytest

from speed_async.launcher.ports import address_at, host_and_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1", "node-7"])
def test_printed_address_is_accepted_by_the_commands(host: str) -> None:
    assert host_and_port(address_at(host, 4711)) == (host, 4711)
