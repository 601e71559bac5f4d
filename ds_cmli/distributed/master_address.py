"""Tells a MASTER_ADDR at which the other nodes of a run would wait for rank 0 in vain.

This module imports nothing heavy: `slurm/check.py` uses it too, before anything else is known to be installed.
"""

import ipaddress
import os
import socket


def means_every_machine(address: str) -> bool:
    """Whether the address is one by which every machine means itself."""
    name = address.strip("[]")
    return name.lower() == "localhost" or _is_own(name)


def mistake(address: str, first_node: bool) -> str | None:
    """Why other nodes do not meet rank 0 at this address; None if they do, as far as this node can tell.

    Args:
        first_node: whether rank 0 runs on this node. Its own name may then be a loopback address, as on Debian.
    """
    told, node = f"MASTER_ADDR is {address!r}", this_node()
    remedy = (
        "set it to the first node's name or address, as all nodes see it, or under Slurm unset it"
    )
    if means_every_machine(address):
        return f"{told}, by which every node means itself, and this run has several nodes: {remedy}"
    if first_node and address.split(".")[0] in (node, socket.gethostname().split(".")[0]):
        return None
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(address, None)]
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:  # the name server may answer later
            return None
        return f"{told}, a name that node {node} does not know: {remedy}"
    if all(map(_is_own, found)):
        return f"{told}, which on node {node} is {found[0]}, the node itself: {remedy}"
    return None


def this_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _is_own(address: str) -> bool:
    """Whether this is an IP address of the loopback network, or that of no machine."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified
