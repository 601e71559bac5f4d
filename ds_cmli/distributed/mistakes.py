"""Finds the lowest rank that has met a mistake, so that the mistake is printed once.

Ranks that have a mistake meet in the store through which a launch starts, with or without a process
group.
"""

import os
import time
from datetime import timedelta

from ds_cmli.libraries import silence

MAX_START = timedelta(seconds=60)  # in which rank 0 opens the store
MEETING = 5.0  # seconds in which the ranks that have a mistake enter it


def lowest_rank() -> int:
    """Return the lowest rank that has a mistake, as this rank has, in the present launch.

    It is this rank if rank 0 does not come, and 0 if rank 0 has ended. A process that is no rank of
    a launch returns 0.
    """
    try:
        rank = int(os.environ["RANK"])
        num_ranks = int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        return 0
    if not 0 <= rank < num_ranks or num_ranks == 1:
        return 0
    silence()
    import torch.distributed as dist

    from ds_cmli.distributed import process_group

    key = f"ds_cmli/mistakes/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it holds the store
    has_started = process_group.has_started()
    entered = {0} if has_started else {rank}
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not has_agent,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=MEETING) if has_started else MAX_START,
        )
        store.append(key, f"{rank} ")  # type: ignore[attr-defined]
        end = time.monotonic() + MEETING
        while time.monotonic() < end:
            entered = {int(number) for number in store.get(key).split()}
            if len(entered) == num_ranks or (rank > 0 and 0 in entered):
                break
            time.sleep(0.1)
    except RuntimeError:  # rank 0 is not there, or no longer
        pass
    return min(entered)
