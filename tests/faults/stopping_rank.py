"""One rank of faults/test_watchdog.py: ten steps, each of which ends in a collective; fates from step 5 on."""

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from ds_cmli.common.cli import leave
from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults.watchdog import Watchdog

fates, timeout, step_time = sys.argv[1].split(" and "), float(sys.argv[2]), float(sys.argv[3])


class Poisoned(Exception):
    pass


def meet(fate, watchdog):
    if fate == "sleeps":
        time.sleep(1000)
    if fate == "spins":
        while True:
            pass
    if fate == "exits":
        os._exit(0)
    if fate == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate in ("is stopped", "is stopped after saving"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "raises":
        raise Poisoned("sample 17")
    if fate == "pauses":  # with all its threads, as by Ctrl-Z and fg
        subprocess.Popen(["sh", "-c", f"sleep {2 * timeout}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "evaluates":  # longer than the limit, but getting on
        for _ in range(int(2 * timeout / 0.2)):
            time.sleep(0.2)
            watchdog.heartbeat()
    if fate == "saves":
        with watchdog.slow():
            time.sleep(2 * timeout)


store = distributed.meet()
victim = int(os.environ["VICTIM"])
with Watchdog(timeout, store) as watchdog:
    distributed.connect(store)
    for step in range(10):
        watchdog.heartbeat(step)
        time.sleep(step_time)
        fate = fates[step - 5] if 0 <= step - 5 < len(fates) else ""
        if "compiles" in fates and step == 0:
            time.sleep(2 * timeout)
        if fate == "agrees":  # a user's mistake, found by all ranks together
            print("FATE", time.time(), flush=True)
            raise UserError("too many broken images")
        if fate == "is stopped after saving":
            with watchdog.slow(together=True):
                time.sleep(1)
                dist.all_reduce(torch.ones(1))
        if fate and (dist.get_rank() == victim or fate == "pauses"):
            print("FATE", time.time(), flush=True)
            meet(fate, watchdog)
        dist.all_reduce(torch.ones(1))
        if step == 0 and fates == ["is stopped after the first step"]:
            time.sleep(0.5)  # until its time limit of the first step has been published
            if dist.get_rank() == victim:
                print("FATE", time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
    if fates == ["preempted"]:
        sys.exit(85)
distributed.shutdown()
print("finished", dist.is_initialized(), flush=True)
leave(0)
