"""Finds the lowest rank that has met a mistake, in the store through which a launch starts."""

import os
import time
from datetime import timedelta

from ds_cmli.libraries import silence

MAX_START = timedelta(seconds=60)  # in which rank 0 opens the store
MEETING_SECONDS = 5.0  # in which the ranks that have a mistake enter it


def lowest_rank() -> int:
    """Return the lowest rank that has a mistake; 0 outside a launch. Each such rank calls this."""
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
    is_open = process_group.launch_store.cache_info().currsize > 0  # it was reached before
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not has_agent,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=MEETING_SECONDS) if is_open else MAX_START,
        )
        is_open = True
        store.append(key, f"{rank} ")  # type: ignore[attr-defined]
        entered = {rank}
        end = time.monotonic() + MEETING_SECONDS
        # Rank 0 may hold the store: it waits for all ranks. Another stops once rank 0 has entered.
        while (
            time.monotonic() < end and len(entered) < num_ranks and (rank == 0 or 0 not in entered)
        ):
            time.sleep(0.1)
            entered = {int(number) for number in store.get(key).split()}
        return min(entered)
    except RuntimeError:
        # If the store was open, rank 0 has ended and printed its mistake; else it is not there.
        return 0 if is_open else rank
