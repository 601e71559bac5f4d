"""How the ranks of a run find each other: rank 0 holds a store, and the others recognise it by a token.

Under Slurm the port is derived from job and step, and is only the first of several candidates: rank 0 takes the first
free one and the other ranks try them all. A port that the user or a launcher has set is the only one used. If it is
taken, rank 0 opens a store at one of the further ports, through which the other ranks learn of the mistake.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from ds_cmli.common.errors import UserError
from ds_cmli.distributed.launchers import is_slurm_step, slurm_ports

ANSWER = 5.0  # seconds to wait for a store's answer
STRANGER = (
    20.0  # seconds for which another program may answer at the given port before that is an error
)
FAILED, TOKEN, COME, ALL = (f"ds_cmli/{name}" for name in ("failed", "token", "come", "all"))


def meet(start: timedelta, stop: Callable[[], None]) -> dist.Store:
    """The store that all ranks of this run share, as soon as all of them have connected. Collective.

    Args:
        start: how long the ranks wait for each other.
        stop: called repeatedly while they wait; an exception that it raises ends the waiting.

    Raises:
        UserError: not all ranks have connected in time, or another program uses the port.
    """
    env = os.environ
    rank, ranks, host = int(env["RANK"]), int(env["WORLD_SIZE"]), env["MASTER_ADDR"]
    end = time.monotonic() + start.total_seconds()
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _beside_the_agents(rank, ranks, start)
    else:
        ports, fixed = _ports()
        store = (
            _hold(host, ports, fixed, ranks)
            if rank == 0
            else _find(host, ports, fixed, start, stop)
        )
    try:
        if store.add(COME, 1) == ranks:
            store.set(ALL, "")
        while not store.check([ALL]):
            stop()
            if time.monotonic() > end:
                raise UserError(
                    f"only {store.add(COME, 0)} of {ranks} ranks met at {host}:{env['MASTER_PORT']} within "
                    f"{start.total_seconds():g} s: see why the others did not start"
                )
            time.sleep(min(1.0, 0.05 + ranks / 1000))
    except dist.DistError:
        stop()  # this rank may have been signalled too, which explains the end better
        raise UserError("rank 0 has ended before all ranks had come: see what it says") from None
    return store


def _ports() -> tuple[list[int], int | None]:
    """The ports at which the store may be, and the port that the user or launcher has set, or None."""
    if (
        os.environ["WORLD_SIZE"] == "1"
    ):  # no other rank has to find the store, so any free port will do
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
        return " ".join(
            [
                token,
                *(env.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")),
            ]
        )
    if (
        env.get("LOCAL_SIZE") == token
    ):  # all ranks are on this machine and in the launcher's process group
        token += f" {os.getpgid(0)}"
    return token


def _beside_the_agents(rank: int, ranks: int, start: timedelta) -> dist.Store:
    """A store held by rank 0, whose address is passed through torchrun's store. torchrun's ends with the launcher."""
    env = os.environ
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    attempt = f"ds_cmli/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        agents = dist.PrefixStore(
            attempt,
            dist.TCPStore(host, port, is_master=False, timeout=start, wait_for_workers=False),
        )
        if rank == 0:
            with socket.create_connection(
                (host, port)
            ) as way:  # gives the address at which others reach this node
                here = way.getsockname()[0]
            here = host if here.startswith("127.") or here == "::1" else here
            store = _listen(here, 0, ranks)
            token = uuid.uuid4().hex
            store.set(TOKEN, token)
            agents.set("store", f"{here} {store.port} {token}")
            return store
        here, at, token = agents.get("store").decode().split()
        reached = _ask(here, int(at), token)
    except (dist.DistError, OSError) as error:
        raise UserError(
            f"rank {rank} of {ranks} does not reach the launcher at {host}:{port}: {error}"
        ) from None
    if reached is None:
        raise UserError(f"rank {rank} of {ranks} does not reach rank 0 at {here}:{at}")
    return reached


def _listen(host: str, port: int, ranks: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, ranks, is_master=True, wait_for_workers=False)


def _hold(host: str, ports: list[int], fixed: int | None, ranks: int) -> dist.Store:
    """Rank 0's part of `meet`: open the store at the first free port."""
    for port in ports:
        try:
            store = _listen(host, port, ranks)
        except dist.DistError as error:
            if "in use" not in str(error):
                raise UserError(
                    f"no store for the ranks at {host}:{port}: {str(error).splitlines()[0]}"
                ) from None
            continue
        if fixed in (None, port):
            os.environ["MASTER_PORT"] = str(store.port)
            store.set(TOKEN, _token())
            return store
        line = f"MASTER_PORT is {fixed}: in use on this machine; set it to a free one"
        store.set(FAILED, line)
        store.set(TOKEN, _token())
        end = time.monotonic() + STRANGER
        while store.add(COME, 0) < ranks - 1 and time.monotonic() < end:
            time.sleep(0.1)
        raise UserError(line)
    raise UserError(
        f"MASTER_PORT: all of {', '.join(map(str, ports))} are in use on this machine; set it to a free one"
    )


def _find(
    host: str, ports: list[int], fixed: int | None, start: timedelta, stop: Callable[[], None]
) -> dist.Store:  # fmt: skip
    """The other ranks' part of `meet`: rank 0's store, at the first port where it answers."""
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    began, stranger = (
        time.monotonic(),
        0.0,
    )  # the time since which another program answers at the given port
    while time.monotonic() - began < start.total_seconds():
        for port in ports:
            stop()
            if not _open(host, port):
                continue
            store = _ask(host, port, _token())
            if store is None:
                stranger = stranger or (port == fixed and time.monotonic()) or 0.0
                continue
            if store.check([FAILED]):
                store.add(COME, 1)
                raise UserError(store.get(FAILED).decode())
            os.environ["MASTER_PORT"] = str(port)
            return store
        if stranger and time.monotonic() - stranger > STRANGER:
            _nobody(
                rank,
                f"MASTER_PORT is {fixed}: another program answers there on {host}; set it to a free one",
            )
        time.sleep(0.3)
    place = f"at {host}:{ports[0]} within {start.total_seconds():g} s"
    _nobody(
        rank, f"rank {rank} of {ranks} met no rank 0 {place}: see why it did not start or has ended"
    )


def _nobody(rank: str, message: str) -> NoReturn:
    if rank == "1":  # rank 0, which prints mistakes for all ranks, is missing
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


def _ask(host: str, port: int, token: str) -> dist.Store | None:
    """The store at this address if its token is this run's. A thread asks, as another program may never answer."""
    answered: list[dist.Store] = []

    def connect() -> None:
        try:
            answer = timedelta(seconds=ANSWER)
            store = dist.TCPStore(
                host, port, is_master=False, timeout=answer, wait_for_workers=False
            )
            if store.get(TOKEN).decode() == token:
                answered.append(store)
        except (dist.DistError, UnicodeDecodeError):
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER + 1)
    return answered[0] if answered else None


def _open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
        return True
    except OSError:
        return False
