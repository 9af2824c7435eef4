"""The interface that ranks meet on."""

from __future__ import annotations

import os

import psutil
import pytest

from medim_ray.train.network import interface_of, meet_on


def test_the_interface_is_the_one_that_holds_the_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert any(entry.address == "127.0.0.1" for entry in psutil.net_if_addrs()[loopback])
    assert interface_of("203.0.113.7") is None  # of the range that documentation has


def test_what_the_user_names_stays_and_an_unknown_address_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    meet_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    meet_on("203.0.113.7")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    meet_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
