"""How the ranks of a run find each other: rank 0 holds a store, and the others know it by a token.

Under Slurm the port is derived from job and step, and is only the first of several candidates: rank
0 takes the first free one and the other ranks try them all. A port that the user or a launcher has
set is the only one used. If it is taken, rank 0 opens a store at one of the further ports, through
which the other ranks learn of the mistake. What network device gloo then uses is decided here, too.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, NoReturn

import psutil
import torch.distributed as dist

from ds_cmli.common.errors import UserError, first_line
from ds_cmli.distributed.launchers import is_slurm_step, means_every_machine, slurm_ports, this_node

ANSWER = 5.0  # seconds to wait for a store's answer
# Seconds for which another program may answer at the given port before that is an error.
STRANGER = 20.0
# The store's keys: why rank 0 has failed, its token, how many ranks have come, and that all have.
FAILED, TOKEN = "ds_cmli/failed", "ds_cmli/token"
COME, ALL = "ds_cmli/come", "ds_cmli/all"
SHARED = "ds_cmli/store"  # a key of torchrun's store: where rank 0's store is, and its token


class Place(NamedTuple):
    host: str
    ports: list[int]  # at which the store may be
    fixed: int | None  # the port that the user or a launcher has set
    rank: int
    ranks: int


def meet(start: timedelta, stop: Callable[[], None]) -> dist.Store:
    """The store that all ranks share, as soon as all of them have connected. Collective.

    Args:
        start: how long the ranks wait for each other.
        stop: called repeatedly while they wait; an exception that it raises ends the waiting.

    Raises:
        UserError: not all ranks have connected in time, or another program uses the port.
    """
    env = os.environ
    end = time.monotonic() + start.total_seconds()
    ports, fixed = _ports()
    ranks = int(env["WORLD_SIZE"])
    place = Place(env["MASTER_ADDR"], ports, fixed, int(env["RANK"]), ranks)
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _beside_the_agents(place, start, stop)
    elif place.rank == 0:
        store = _hold(place)
    else:
        store = _find(place, start, stop)
    try:
        if store.add(COME, 1) == ranks:
            store.set(ALL, "")
        while not store.check([ALL]):
            stop()
            if time.monotonic() > end:
                raise UserError(
                    f"only {store.add(COME, 0)} of {ranks} ranks met at "
                    f"{place.host}:{env['MASTER_PORT']} within {start.total_seconds():g} s: "
                    "see why the others did not start"
                )
            time.sleep(min(1.0, 0.05 + ranks / 1000))
    except dist.DistError:
        stop()  # this rank may have been signalled too, which explains the end better
        raise UserError("rank 0 has ended before all ranks had come: see what it says") from None
    return store


def _ports() -> tuple[list[int], int | None]:
    """The ports at which the store may be, and the port that was set for this run, or None."""
    # If no other rank has to find the store, any free port will do.
    if os.environ["WORLD_SIZE"] == "1":
        return [0], 0
    given = int(os.environ["MASTER_PORT"])
    if is_slurm_step() and given == slurm_ports()[0]:
        return slurm_ports(), None
    return [given, *(12000 + (given + 2003 * i) % 20000 for i in range(4))], given


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


def _beside_the_agents(place: Place, start: timedelta, stop: Callable[[], None]) -> dist.Store:
    """A store held by rank 0, whose address is passed through torchrun's store.

    torchrun's own store ends with the launcher, and outlives the ranks that it starts again. It may
    thus still hold the address of ranks before these. Their store is gone, or is one to which all
    have come.
    """
    host, port = place.host, int(os.environ["MASTER_PORT"])
    me, seconds = f"rank {place.rank} of {place.ranks}", start.total_seconds()
    end = time.monotonic() + seconds
    agents = None
    while agents is None:
        stop()
        if time.monotonic() > end:
            raise UserError(f"{me} did not reach the launcher at {host}:{port}")
        time.sleep(0.05)
        if _open(host, port):
            agents = _ask(host, port, None)
    agents.set_timeout(start)
    try:
        if place.rank == 0:
            # The connection tells the address at which others reach this node.
            with socket.create_connection((host, port)) as way:
                here = way.getsockname()[0]
            if here.startswith("127.") or here == "::1":
                here = host
            store = _listen(here, 0, place.ranks)
            token = uuid.uuid4().hex
            store.set(TOKEN, token)
            agents.set(SHARED, f"{here} {store.port} {token}")
            return store
        while time.monotonic() < end:
            stop()
            if agents.check([SHARED]):
                here, at, token = agents.get(SHARED).decode().split()
                # Where nothing listens any more, PyTorch would print the frames of its C++ code.
                if _open(here, int(at)) and (reached := _ask(here, int(at), token)):
                    return reached
            time.sleep(0.3)
    except (dist.DistError, OSError) as error:
        line = first_line(error)
        raise UserError(f"{me} does not reach the launcher at {host}:{port}: {line}") from None
    _nobody(
        place.rank,
        f"{me} met no rank 0 within {seconds:g} s: see why it did not start or has ended",
    )


def _listen(host: str, port: int, ranks: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, ranks, is_master=True, wait_for_workers=False)


def _hold(place: Place) -> dist.Store:
    """Do rank 0's part of `meet`: open the store at the first free port."""
    for port in place.ports:
        try:
            store = _listen(place.host, port, place.ranks)
        except dist.DistError as error:
            if "in use" in str(error):
                continue
            line = first_line(error)
            raise UserError(f"no store for the ranks at {place.host}:{port}: {line}") from None
        if place.fixed not in (None, port):
            _tell_failure(store, place)
        os.environ["MASTER_PORT"] = str(store.port)
        store.set(TOKEN, _token())
        return store
    ports = ", ".join(map(str, place.ports))
    raise UserError(f"MASTER_PORT: all of {ports} are in use on this machine; set it to a free one")


def _tell_failure(store: dist.Store, place: Place) -> NoReturn:
    """Tell the other ranks, through a store at another port, that the given port is taken."""
    line = f"MASTER_PORT is {place.fixed}: in use on this machine; set it to a free one"
    store.set(FAILED, line)
    store.set(TOKEN, _token())
    end = time.monotonic() + STRANGER
    while store.add(COME, 0) < place.ranks - 1 and time.monotonic() < end:
        time.sleep(0.1)
    raise UserError(line)


def _find(place: Place, start: timedelta, stop: Callable[[], None]) -> dist.Store:
    """Do the other ranks' part of `meet`: find rank 0's store, where it answers."""
    began = time.monotonic()
    stranger = 0.0  # the time since which another program answers at the given port
    while time.monotonic() - began < start.total_seconds():
        for port in place.ports:
            stop()
            if not _open(place.host, port):
                continue
            store = _ask(place.host, port, _token())
            if store is None:
                if port == place.fixed:
                    stranger = stranger or time.monotonic()
                continue
            if store.check([FAILED]):
                store.add(COME, 1)
                raise UserError(store.get(FAILED).decode())
            os.environ["MASTER_PORT"] = str(port)
            return store
        if stranger and time.monotonic() - stranger > STRANGER:
            _nobody(
                place.rank,
                f"MASTER_PORT is {place.fixed}: another program answers there on {place.host}; set "
                "it to a free one",
            )
        time.sleep(0.3)
    _nobody(
        place.rank,
        f"rank {place.rank} of {place.ranks} met no rank 0 at {place.host}:{place.ports[0]} within "
        f"{start.total_seconds():g} s: see why it did not start or has ended",
    )


def _nobody(rank: int, message: str) -> NoReturn:
    if rank == 1:  # rank 0, which prints mistakes for all ranks, is missing
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


def _ask(host: str, port: int, token: str | None) -> dist.Store | None:
    """The store at this address if its token is this run's, or None, and not all ranks have come.

    A thread asks, as another program may never answer.
    """
    answered: list[dist.Store] = []

    def connect() -> None:
        try:
            answer = timedelta(seconds=ANSWER)
            store = dist.TCPStore(
                host, port, is_master=False, timeout=answer, wait_for_workers=False
            )
            own = token is None or store.get(TOKEN).decode() == token
            if own and not store.check([ALL]):
                answered.append(store)
        except (dist.DistError, UnicodeDecodeError):
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(1.2 * ANSWER)
    return next(iter(answered), None)


def _open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
        return True
    except OSError:
        return False


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
    for name, found in psutil.net_if_addrs().items():
        if not _is_loopback(own) and own in [address.address for address in found]:
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
