"""python tests/memory/real_ranks.py: peaks of that one of real gloo ranks on this CPU which needs the most memory,
beside predicted ones, and what it is asked to move.

Stages 0 to 3 x ranks 1, 2, 3 x accumulation 1, 2 x checkpointing x bf16, fp32 x texts gathered or in a ring, with
captions of full length, or those that the options name. All take many minutes; ends with exit code 1 where a peak
differs by more than `BAR` bytes, or any count of calls or bytes.
"""

import argparse
import multiprocessing
import os
import sys
from contextlib import nullcontext
from itertools import product

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ds_cmli.common import quiet

quiet.silence()

import deepspeed  # noqa: E402, F401 - once, for all processes
import torch.distributed as dist  # noqa: E402

from ds_cmli.common.cli import leave  # noqa: E402
from ds_cmli.config.presets import load_preset  # noqa: E402
from ds_cmli.distributed.traffic import Traffic  # noqa: E402
from ds_cmli.memory.inputs import likeliest  # noqa: E402
from ds_cmli.memory.predict import Options, predict  # noqa: E402
from profiling.measure_cpu import counted_traffic, measure_phases  # noqa: E402
from tests.conftest import free_port  # noqa: E402

BAR = 512
AXES: dict[str, list] = {
    "ranks": [1, 2, 3],
    "preset": ["tiny"],
    "stage": [0, 1, 2, 3],
    "accumulation": [1, 2],
    "checkpointing": ["off", "on"],
    "precision": ["bf16", "fp32"],
    "exchange": ["gather", "ring"],
    "losses": ["document"],
}
LOSSES = {
    "document": {"weights": dict.fromkeys(("global", "cmli", "target_cmli"), 1.0)},
    "contrast": {"weights": dict.fromkeys(("cmli", "token_contrast", "cls_contrast"), 1.0), "bank": 1000},
}


def setting(preset, stage, accumulation, checkpointing, precision, exchange, losses):
    """(configuration, DeepSpeed JSON)"""
    ds_config = {
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
        **({"activation_checkpointing": {}} if checkpointing == "on" else {}),
    }
    loss = {**LOSSES[losses], "cmli_exchange": exchange}
    return load_preset(preset, {"loss": loss}), ds_config


def measured(world_size: int, *each) -> tuple[dict[str, int], dict]:
    """The peak of each phase of one of real ranks, and the counts of what it moves."""
    port = free_port()
    ranks = [_forked(_measure, rank, world_size, port, *each) for rank in range(world_size)]
    return ranks[likeliest(each[1], world_size)].get()


def predicted(world_size: int, *each) -> tuple[dict[str, int], dict]:
    return _forked(_predict, world_size, *each).get()


def _forked(function, *arguments):
    """The queue that gets the result of a process of its own.

    In a process that has measured before, what is left of the last engine ends in the middle of the next measurement.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run() -> None:
        try:
            results.put(function(*arguments))
        finally:
            leave(0)

    context.Process(target=run).start()
    return results


def _measure(rank: int, world_size: int, port: int, *each) -> tuple[dict[str, int], dict]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    peaks = measure_phases(*setting(*each), world_size)
    return peaks, counted_traffic(*setting(*each), world_size).counts


def _predict(world_size: int, *each) -> tuple[dict[str, int], dict]:
    traffic = Traffic()
    watch = lambda train_engine, step: traffic.counting() if step else nullcontext()  # noqa: E731
    rank = likeliest(each[1], world_size)
    report = predict(*setting(*each), world_size, target="cpu", rank=rank, options=Options(watch=watch)).report
    return report.phases, traffic.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="*", type=type(values[0]), default=values)
    settings = list(product(*vars(parser.parse_args()).values()))
    missed = 0
    for each in settings:
        world_size, _, stage, accumulation, checkpointing, precision, exchange, losses = each
        (peaks, moved), (expected, expected_moved) = measured(*each), predicted(*each)
        ours, theirs = max(expected.values()), max(peaks.values())
        missed += abs(ours - theirs) > BAR or moved != expected_moved
        off = {name: expected[name] - size for name, size in peaks.items()}
        worst = max(off, key=lambda name: abs(off[name]))
        print(
            f"stage {stage}, {world_size} ranks, accumulation {accumulation}, checkpointing "
            f"{checkpointing:3}, {precision}, {exchange}, {losses}: measured {theirs:9,} B, predicted {ours:9,} B, "
            f"{ours - theirs:+9,} B ({ours / theirs - 1:+.3%}); the furthest phase: {worst} {off[worst]:+,} B",
            flush=True,
        )
        for key in sorted({*moved, *expected_moved}):
            same = moved.get(key) == expected_moved.get(key)
            print(f"  {' '.join(key)}: {moved.get(key)}{'' if same else f', predicted {expected_moved.get(key)}'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
