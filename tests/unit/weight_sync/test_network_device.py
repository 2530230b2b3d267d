"""The device that reaches another host."""

import sys

import pytest

from speed_async.weight_sync.network_device import device_with, own_address


@pytest.mark.skipif(sys.platform != "linux", reason="devices are looked up on Linux only")
def test_device_is_found_by_its_address() -> None:
    assert own_address("localhost") in ("127.0.0.1", "::1")
    assert device_with(own_address("127.0.0.1")) == "lo"
    assert device_with("192.0.2.77") is None
