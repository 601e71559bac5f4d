"""Checks that this node can train: prints one line for each thing that is missing, and then ends
with exit code 1. `check.py network` checks that the nodes reach each other, as the ranks will.

`slurm/train.sh` runs it once on every node. It imports only the standard library, as other packages
may be missing.
"""

import os
import sys
from importlib.util import find_spec

LIMIT = 30.0  # seconds in which the nodes must have met, and then reached each other
PACKAGES = ("torch", "deepspeed", "transformers", "timm")


def missing() -> list[str]:
    python = f"{sys.executable} ({sys.version.split()[0]})"
    if sys.version_info < (3, 10):  # noqa: UP036
        return [f"{python} is too old: Python 3.10 or newer is needed; set DS_CMLI_PYTHON to one"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if find_spec("ds_cmli") is None:
        return [
            f"{python} does not find the package ds_cmli: "
            f"set DS_CMLI_PYTHON, or pip install -e {root}"
        ]
    lines = [
        f"{python} has no {name}: pip install -e {root}"
        for name in PACKAGES
        if find_spec(name) is None
    ]
    cache = os.environ.get("TRITON_CACHE_DIR")
    if cache:
        # Compiled code is loaded from this folder. If all users may write there, it must belong
        # to this user.
        try:
            os.makedirs(cache, mode=0o700, exist_ok=True)
            if os.stat(cache).st_uid != os.getuid():
                lines.append(
                    f"TRITON_CACHE_DIR is {cache!r}: it belongs to another user; "
                    "set it to a folder of yours"
                )
        except OSError as error:
            lines.append(f"TRITON_CACHE_DIR is {cache!r}: it cannot be made: {error.strerror}")
    if (
        os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1"
        and "MASTER_ADDR" in os.environ
        and not lines
    ):
        lines += unreachable()
    granted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if granted and not lines:
        import torch

        seen = torch.cuda.device_count()
        if seen != granted:
            lines.append(
                f"{granted} GPUs are granted, but torch {torch.__version__} sees {seen}: "
                "install a torch build for "
                "these GPUs and their driver, or pass them into the container (apptainer exec --nv)"
            )
    return lines


def unreachable() -> list[str]:
    from ds_cmli.distributed import launchers

    first_node = os.environ["SLURM_NODEID"] == "0"
    line = launchers.address_mistake(first_node)
    # The first prints what is so on all nodes.
    everywhere = launchers.means_every_machine(os.environ["MASTER_ADDR"])
    return [] if line is None or (everywhere and not first_node) else [line]


def network() -> list[str]:
    """Try the collectives of a run, of gloo and on GPUs of NCCL, with one rank a node. Collective.

    A node that waits too long ends with exit code 2, after the first one has said why.
    """
    from datetime import timedelta

    from ds_cmli.common import quiet
    from ds_cmli.common.errors import UserError
    from ds_cmli.distributed import process_group as distributed

    quiet.silence()
    try:
        distributed.connect(distributed.meet(timedelta(seconds=LIMIT)), limit=LIMIT)  # collectives
        distributed.CollectiveFlags(LIMIT)  # collective
        distributed.shutdown()
    except UserError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    lines = network() if sys.argv[1:] == ["network"] else missing()
    for line in lines:
        print(f"error: node {node}: {line}", file=sys.stderr)
    sys.exit(1 if lines else 0)
