"""Processes that one of ours starts, watches and ends."""

from __future__ import annotations

from fedtune.processes import past_proxies


def test_a_proxy_for_the_world_is_not_used_for_this_machine() -> None:
    environment = {"no_proxy": "example.org", "HTTPS_PROXY": "http://proxy:3128"}
    found = past_proxies("10.0.0.5", environment=environment)
    assert found == dict.fromkeys(("no_proxy", "NO_PROXY"), "example.org,127.0.0.1,::1,localhost,10.0.0.5")
