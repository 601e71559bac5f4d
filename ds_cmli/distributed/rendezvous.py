"""How the ranks of a run find each other: rank 0 holds a store, and the others know it by a token.

Rank 0 takes the first free one of a run's ports, and the other ranks ask at all of them: that which
the user or a launcher has set, or under Slurm several, which follow from job and step. Under
torchrun the launcher's own store holds where rank 0's is. What network device gloo then uses is
decided here, too.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from math import inf
from typing import NamedTuple, NoReturn

import psutil
import torch.distributed as dist

from ds_cmli.common.errors import UserError, first_line
from ds_cmli.distributed.launchers import is_slurm_step, means_every_machine, slurm_ports, this_node

ANSWER = 5.0  # seconds to wait for a store's answer
# Seconds for which another program may answer at the given port before that is an error.
STRANGER = 15.0
# The store's keys: its token, how many ranks have come, and that all have.
TOKEN, COME, ALL = "ds_cmli/token", "ds_cmli/come", "ds_cmli/all"
SHARED = "ds_cmli/store"  # a key of torchrun's store: the `Address` of rank 0's


# What ranks that have met before in these processes meet at again, by how they were launched: the
# store, and how often. Rank 0's own port would still be taken.
_met: dict[tuple[str, ...], list[dist.Store]] = {}


class Address(NamedTuple):
    """Where a store is, and the token by which it is known; without one any store is right."""

    host: str
    port: int
    token: str = ""


def meet(start: timedelta) -> dist.Store:
    """The store that all ranks share, as soon as all of them have connected. Collective.

    Args:
        start: how long the ranks wait for each other.

    Raises:
        UserError: not all ranks have connected in time, or another program uses the port.
    """
    env, end = os.environ, time.monotonic() + start.total_seconds()
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    launch = tuple(env[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    before = _met.setdefault(launch, []) if ranks > 1 else []
    find = _of_ports
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        find = _of_launcher
    try:
        store = dist.PrefixStore(f"{len(before)}", before[0]) if before else find(rank, end)
        at = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} within {start.total_seconds():g} s"
        if store is None:
            line = f"rank {rank} of {ranks} met no rank 0 at {at}"
            _refuse(rank, f"{line}: see why it did not start or has ended")
        if store.add(COME, 1) == ranks:
            store.set(ALL, "")
        while not store.check([ALL]):
            if time.monotonic() > end:
                line = f"only {store.add(COME, 0)} of {ranks} ranks met at {at}"
                raise UserError(f"{line}: see why the others did not start")
            time.sleep(min(1.0, 0.05 + ranks / 1000))
    except dist.DistError:
        raise UserError("rank 0 has ended before all ranks had come: see what it says") from None
    before.append(store)
    return store


def _refuse(rank: int, message: str) -> NoReturn:
    if rank == 1:  # rank 0, which prints mistakes for all ranks, is missing
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


def _of_launcher(rank: int, end: float) -> dist.Store | None:
    """Rank 0's store, whose address is passed through torchrun's; None: not found in time.

    torchrun's own store ends with the launcher, and outlives the ranks that it starts again. It may
    thus still hold the address of ranks before these. Their store is gone, or is one to which all
    have come.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = _find(lambda: [Address(host, port)], end)
    if agents is None:
        me = f"rank {rank} of {os.environ['WORLD_SIZE']}"
        raise UserError(f"{me} did not reach the launcher at {host}:{port}")
    if rank == 0:
        own, token = _own_address(host), uuid.uuid4().hex  # at which others reach this node
        if own is None or _is_loopback(own):
            own = host
        store = _hold(own, [0], token)
        agents.set(SHARED, f"{own} {store.port} {token}")
        return store

    def shared() -> list[Address]:
        if not agents.check([SHARED]):
            return []
        name, number, token = agents.get(SHARED).decode().split()
        return [Address(name, int(number), token)]

    return _find(shared, end)


def _of_ports(rank: int, end: float) -> dist.Store | None:
    """Rank 0's store, at a port that all ranks know; None: not found in time."""
    env = os.environ
    host, ports, token = env["MASTER_ADDR"], [int(env["MASTER_PORT"])], _token()
    patience = STRANGER
    if env["WORLD_SIZE"] == "1":  # no other rank has to find the store
        ports = [0]
    elif is_slurm_step() and ports[0] == slurm_ports()[0]:
        ports, patience = slurm_ports(), inf
    store: dist.TCPStore | None
    if rank == 0:
        store = _hold(host, ports, token)
    else:
        addresses = [Address(host, port, token) for port in ports]
        store = _find(lambda: addresses, end, patience)
        if store is None and time.monotonic() < end:
            line = f"MASTER_PORT is {ports[0]}: another program answers there on {host}"
            _refuse(rank, f"{line}; set it to a free one")
    if store is not None:
        env["MASTER_PORT"] = str(store.port)
    return store


def _token() -> str:
    """A text that all ranks of this run know and ranks of another run do not."""
    env = os.environ
    token = env["WORLD_SIZE"]
    if is_slurm_step():
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
            token += f" {env.get(name, '')}"
    elif env.get("LOCAL_SIZE") == token:
        # All ranks are on this machine and in the launcher's process group.
        token += f" {os.getpgid(0)}"
    return token


def _hold(host: str, ports: list[int], token: str) -> dist.TCPStore:
    """Rank 0's store, at the first free one of the ports."""
    for port in ports:
        try:
            store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        except dist.DistError as error:
            if "in use" in str(error):
                continue
            line = first_line(error)
            raise UserError(f"no store for the ranks at {host}:{port}: {line}") from None
        store.set(TOKEN, token)
        return store
    tried = ", ".join(map(str, ports))
    raise UserError(f"MASTER_PORT is {tried}: in use on this machine; set it to a free one")


def _find(
    addresses: Callable[[], list[Address]], end: float, patience: float = inf
) -> dist.TCPStore | None:
    """The first store that is right; None: not in time, or not where others answer for `patience`.

    Args:
        patience: in seconds.
    """
    answered: float | None = None
    while time.monotonic() < end:
        for address in addresses():
            # Where nothing listens, PyTorch would print the frames of its C++ code.
            if not _listens(address):
                continue
            store = _ask(address)
            if store is not None:
                return store
            answered = answered or time.monotonic()
        if answered and time.monotonic() - answered > patience:
            break
        time.sleep(0.3)
    return None


def _listens(address: Address) -> bool:
    try:
        socket.create_connection(address[:2], timeout=2).close()
        return True
    except OSError:
        return False


def _ask(address: Address) -> dist.TCPStore | None:
    """The store at this address if its token is right and not all ranks have come to it, or None.

    A thread asks, as another program may never answer.
    """
    answered: list[dist.TCPStore] = []

    def connect() -> None:
        try:
            answer = timedelta(seconds=ANSWER)
            store = dist.TCPStore(
                address.host, address.port, is_master=False, timeout=answer, wait_for_workers=False
            )
            right = not address.token or store.get(TOKEN).decode() == address.token
            if right and not store.check([ALL]):
                answered.append(store)
        except (dist.DistError, UnicodeDecodeError):
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(1.2 * ANSWER)
    return next(iter(answered), None)


def choose_device_of_gloo(store: dist.Store) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would offer other nodes an address they cannot reach.

    It offers that of this host's name, which is a loopback address on Debian, or the loopback
    device if the name has none (pytorch/pytorch#68726). The network device of the route to
    MASTER_ADDR is named instead, if ranks are on several nodes. Collective.
    """
    env = os.environ
    own = _own_address(env["MASTER_ADDR"])
    store.set(f"ds_cmli/node/{env['RANK']}", f"{this_node()} {own}")
    if "GLOO_SOCKET_IFNAME" in env or means_every_machine(env["MASTER_ADDR"]):
        return
    if not _is_loopback(_first_address(socket.gethostname())):
        return
    ranks = range(int(env["WORLD_SIZE"]))
    texts = store.multi_get([f"ds_cmli/node/{rank}" for rank in ranks])  # waits for all of them
    addresses = dict(text.decode().split(" ") for text in texts)
    addresses.pop(this_node())
    if not addresses:
        return
    if _is_loopback(own):  # the first node may know itself by such an address
        own = _own_address(next(iter(addresses.values())))
    for name, entries in psutil.net_if_addrs().items():
        if not _is_loopback(own) and own in [address.address for address in entries]:
            env["GLOO_SOCKET_IFNAME"] = name


def _first_address(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is None or means_every_machine(address)


def _own_address(host: str) -> str | None:
    """This node's address on the way to `host`; None if there is no way."""
    try:
        family, _, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(there)  # chooses a network device, and sends nothing
            return str(way.getsockname()[0])
    except OSError:
        return None
