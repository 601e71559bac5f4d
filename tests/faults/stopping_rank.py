"""One rank of faults/test_watchdog.py: ten steps, each of which ends in a collective; a fate in step 5 of one rank."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from ds_cmli.common import leave
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults.watchdog import Watchdog

fate, timeout, victim = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])


def meet(watchdog):
    if fate == "sleeps":
        time.sleep(1000)
    if fate == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "evaluates":  # longer than the limit, but getting on
        for _ in range(int(2 * timeout / 0.2)):
            time.sleep(0.2)
            watchdog.heartbeat()
    if fate == "saves":
        with watchdog.slow():
            time.sleep(2 * timeout)


distributed.init()
with Watchdog(timeout) as watchdog:
    for step in range(10):
        watchdog.heartbeat(step)
        time.sleep(2 * timeout if fate == "compiles" and step == 0 else 0.1)
        if step == 5 and distributed.rank() == victim:
            print("FATE", time.time(), flush=True)
            meet(watchdog)
        dist.all_reduce(torch.ones(1))
distributed.shutdown()
print("finished", flush=True)
leave(0)
