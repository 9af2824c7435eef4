"""Through which interface the ranks meet: the one that the cluster's own address of this node is on."""

from __future__ import annotations

import os

import psutil

_GLOO = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The network interface that holds this IP address; None where no interface of this host does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def meet_on(address: str) -> None:
    """gloo gives the other ranks the address that the host's name resolves to, which many distributions' /etc/hosts
    make 127.0.1.1: the others would call themselves. It takes the interface of `address` instead, the node's address
    in the cluster, unless the user names one."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(_GLOO, name)
