"""python tests/memory/real_ranks.py: peaks of that one of real gloo ranks on this CPU which needs the most memory,
beside predicted ones, and what it is asked to move.

Stages 0 to 3 x ranks 1, 2, 3 x accumulation 1, 2 x checkpointing x bf16, fp32 x texts gathered or in a ring x kinds of
runs, with captions of full length, or those that the options name; with `--pairwise` as few as let any two values meet.
All take hours; ends with exit code 1 where a peak differs by more than `BAR` bytes, or any count of calls or bytes, or
where only one of prediction and measurement is refused.
"""

import argparse
import multiprocessing
import os
import sys
from contextlib import nullcontext
from itertools import chain, combinations, product

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ds_cmli.common import quiet

quiet.silence()

import deepspeed  # noqa: E402, F401 - once, for all processes
import torch.distributed as dist  # noqa: E402

from ds_cmli.common.cli import leave  # noqa: E402
from ds_cmli.common.errors import UserError  # noqa: E402
from ds_cmli.config.presets import load_preset  # noqa: E402
from ds_cmli.distributed.traffic import Traffic  # noqa: E402
from ds_cmli.memory.largest_rank import predict_largest  # noqa: E402
from ds_cmli.memory.predict import Options  # noqa: E402
from profiling.memory.measure_cpu import counted_traffic, measure_phases  # noqa: E402
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
    "kind": ["document", "plain", "patch_keep", "lora", "aspect"],
    "blocks": [2],  # of each encoder and of the teacher
}
DOCUMENT = {"weights": dict.fromkeys(("global", "cmli", "target_cmli"), 1.0)}
NAFLEX = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "use_naflex": True}
ASPECT = {"data": {"aspect_patch": 14}, "student": {"image_overrides": NAFLEX}, "teacher": {"overrides": NAFLEX}}
ADAPTERS = {"image": ["qkv", "mlp.fc1"], "text": ["query", "value"]}
# kind: (settings, keys of the JSON); with accumulation all but `plain` cache gradients
KINDS: dict[str, tuple[dict, dict]] = {
    "document": ({"loss": DOCUMENT}, {}),
    "plain": ({"loss": DOCUMENT, "optim": {"negatives": "micro_batch"}}, {}),
    "patch_keep": ({"loss": DOCUMENT, "student": {"patch_keep": 0.5}}, {}),
    "lora": ({"loss": DOCUMENT, "student": {"lora": ADAPTERS}}, {}),
    "aspect": ({"loss": DOCUMENT, **ASPECT}, {}),
}


def setting(preset, stage, accumulation, checkpointing, precision, exchange, kind, blocks):
    """(configuration, DeepSpeed JSON)"""
    sections, keys = KINDS[kind]
    ds_config = {
        **keys,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
        **({"activation_checkpointing": {}} if checkpointing == "on" else {}),
    }
    loss = {**sections["loss"], "cmli_exchange": exchange}
    towers = {
        "student": {**sections.get("student", {}), "layers": blocks},
        "teacher": {**sections.get("teacher", {}), "block": blocks - 1},
    }
    return load_preset(preset, {**sections, **towers, "loss": loss}), ds_config


def pairwise(axes: dict[str, list]) -> list[tuple]:
    """Few settings in which any two values of two axes meet: always the one with the most new pairs is next."""
    settings = {by_name: set(combinations(enumerate(by_name), 2)) for by_name in product(*axes.values())}
    left, chosen = set(chain.from_iterable(settings.values())), []
    while left:
        chosen.append(max(settings, key=lambda by_name: len(settings[by_name] & left)))
        left -= settings[chosen[-1]]
    return chosen


def measured(world_size: int, *item) -> tuple[dict[str, int], dict] | str:
    """The peak of each phase of that real rank which needs the most, and the counts of what it moves; or the line that
    refuses it."""
    port = free_port()
    ranks = [_forked(_measure, rank, world_size, port, *item) for rank in range(world_size)]
    results = [rank.get() for rank in ranks]
    refused = [result for result in results if isinstance(result, str)]
    return refused[0] if refused else max(results, key=lambda result: max(result[0].values()))


def predicted(world_size: int, *item) -> tuple[dict[str, int], dict] | str:
    return _forked(_predict, world_size, *item).get()


def _forked(function, *arguments):
    """The queue that gets the result of a process of its own.

    In a process that has measured before, what is left of the last engine ends in the middle of the next measurement.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run() -> None:
        try:
            results.put(function(*arguments))
        except UserError as error:
            results.put(str(error))
        finally:
            leave(0)

    context.Process(target=run).start()
    return results


def _measure(rank: int, world_size: int, port: int, *item) -> tuple[dict[str, int], dict]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    peaks = measure_phases(*setting(*item), world_size)
    return peaks, counted_traffic(*setting(*item), world_size).counts


def _predict(world_size: int, *item) -> tuple[dict[str, int], dict]:
    traffic = Traffic()

    def watch(train_engine, step):
        traffic.counts.clear()  # of the rank that was predicted before
        return traffic.counting() if step else nullcontext()

    prediction = predict_largest(*setting(*item), world_size, target="cpu", options=Options(watch=watch))
    return prediction.report.phases, traffic.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="*", type=type(values[0]), default=values)
    parser.add_argument("--pairwise", action="store_true")
    options = vars(parser.parse_args())
    few = options.pop("pairwise")
    missed = 0
    for item in pairwise(options) if few else product(*options.values()):
        world_size, _, stage, accumulation, checkpointing, precision, exchange, kind, _ = item
        entry, foreseen = measured(*item), predicted(*item)
        if isinstance(entry, str) or isinstance(foreseen, str):
            missed += entry != foreseen
            print(f"{kind}, stage {stage}, {world_size} ranks, {precision}: refused: {entry}, predicted {foreseen}")
            continue
        (peaks, moved), (expected, expected_moved) = entry, foreseen
        ours, theirs = max(expected.values()), max(peaks.values())
        missed += abs(ours - theirs) > BAR or moved != expected_moved
        off = {name: expected[name] - size for name, size in peaks.items()}
        worst = max(off, key=lambda name: abs(off[name]))
        print(
            f"stage {stage}, {world_size} ranks, accumulation {accumulation}, checkpointing "
            f"{checkpointing:3}, {precision}, {exchange}, {kind}: measured {theirs:9,} B, predicted {ours:9,} B, "
            f"{ours - theirs:+9,} B ({ours / theirs - 1:+.3%}); the furthest phase: {worst} {off[worst]:+,} B",
            flush=True,
        )
        for key in sorted({*moved, *expected_moved}):
            same = moved.get(key) == expected_moved.get(key)
            print(f"  {' '.join(key)}: {moved.get(key)}{'' if same else f', predicted {expected_moved.get(key)}'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
