"""One rank of test_connecting.py: meets the other, and connects unless it is told to be away."""

import os
import sys
import time

from ds_cmli.common.cli import leave
from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed

rank, away, limit = os.environ["RANK"], sys.argv[1], float(sys.argv[2])
store = distributed.meet()
if rank == away:
    time.sleep(60)
try:
    device = distributed.connect(store, limit=limit)
    flags = distributed.CollectiveFlags(limit).any(rank == "1", False)
    print(f"rank {rank} on {device.type}: {flags} by {os.environ.get('GLOO_SOCKET_IFNAME')}", flush=True)
    distributed.shutdown()
except UserError as error:
    print(f"rank {rank}: {error}", flush=True)
    leave(2)
leave(0)
