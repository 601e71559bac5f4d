"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. Reads top to bottom:
configuration -> processes -> data -> step -> loop.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from datetime import datetime  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli.cli import GroupedCommand, option, run_command  # noqa: E402
from ds_cmli.config import LOSSES, Config, parse_losses, parse_settings  # noqa: E402
from ds_cmli.errors import UserError  # noqa: E402
from ds_cmli.presets import PRESETS, load_preset  # noqa: E402

DEFAULT_JSON = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@option("What to train", "--preset", default="demo", show_default=True, help=f"One of: {', '.join(PRESETS)}.")
@option("What to train", "--losses", help=f"Of {', '.join(LOSSES)}; NAME or NAME=WEIGHT, by comma.  [preset]")
@option("What to train", "--init", type=click.Choice(["preset", "random"]), default="preset", show_default=True,
        help="Start from the preset's weights, or from random ones (nothing is downloaded for them).")  # fmt: skip
@option("What to train", "--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE",
        help="Any other setting, as --dry-run prints them; for instance student.layers=4. Repeatable.")  # fmt: skip
@option("Data", "--data", help="'demo', or a folder of images with metadata.jsonl or metadata.csv.  [preset]")
@option("Data", "--workers", type=int, help="Data loading processes per rank.  [preset]")
@option("Length and batch", "--steps", type=int, help="Optimizer steps.  [preset]")
@option("Length and batch", "--epochs", type=float, help="Instead of --steps.  [preset]")
@option("Length and batch", "--micro-batch", type=int, help='Pairs per rank, where the JSON says "auto".  [preset]')
@option("Length and batch", "--lr", type=float, help='Learning rate, where the JSON says "auto".  [preset]')
@option("Length and batch", "--seed", type=int, help="Of weights, data order and scenes.  [0]")
@option("Output", "--output-dir", help="Where the run is written.  [runs/<preset>-<date and time>]")
@option("Output", "--log-every", type=int, help="Steps between two logged ones.  [preset]")
@option("Output", "--eval-every", type=int, help="Steps between evaluations; 0: only at the end.  [preset]")
@option("Output", "--save-every", type=int, help="Steps between checkpoints; 0: only at the end.  [preset]")
@option("DeepSpeed", "--deepspeed_config", default=str(DEFAULT_JSON), help="The JSON.  [ds_configs/zero2.json]")
@option("DeepSpeed", "--dry-run", is_flag=True, help="Check everything, print the resolved configuration, and stop.")
@option("DeepSpeed", "--deepspeed", is_flag=True, hidden=True)  # passed by habit; the JSON is always read
@option("DeepSpeed", "--local_rank", type=int, hidden=True)  # passed by the deepspeed launcher; the same in LOCAL_RANK
def command(preset: str, deepspeed_config: str, dry_run: bool, settings: tuple[str, ...], **options: Any) -> None:
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI losses.

    With no options it trains the preset "demo" to its end.
    """
    config = resolve_config(preset, settings, options)
    train(config, deepspeed_config, dry_run)


def resolve_config(preset: str, settings: tuple[str, ...], options: dict[str, Any]) -> Config:
    """The preset with the command line on top; only what was given overrides."""
    places = {
        "data": ("data", "source"), "workers": ("data", "workers"),
        "steps": ("optim", "steps"), "epochs": ("optim", "epochs"),
        "micro_batch": ("optim", "micro_batch"), "lr": ("optim", "lr"),
        "seed": ("run", "seed"), "output_dir": ("run", "output_dir"), "log_every": ("run", "log_every"),
        "eval_every": ("run", "eval_every"), "save_every": ("run", "save_every"),
    }  # fmt: skip
    overrides = parse_settings(settings)
    for name, (section, key) in places.items():
        if options[name] is not None:
            overrides.setdefault(section, {})[key] = options[name]
    # One of the two replaces whichever the preset names.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if options[given] is not None and options[other] is None:
            overrides["optim"][other] = None
    if options["losses"] is not None:
        overrides.setdefault("loss", {})["weights"] = parse_losses(options["losses"])
    if options["init"] == "random":
        overrides.setdefault("student", {}).update(image_weights="random", text_weights="random")
        overrides.setdefault("teacher", {})["weights"] = "random"
        overrides.setdefault("data", {}).setdefault("tokenizer", "builtin")
    return load_preset(preset, overrides)


def train(config: Config, json_path: str, dry_run: bool) -> None:
    from ds_cmli import quiet

    quiet.silence()
    from ds_cmli import deepspeed_json, distributed, step
    from ds_cmli.data import GlobalBatchSampler, assets, build_data

    # --- processes
    distributed.map_launcher_environment()
    world_size = int(os.environ["WORLD_SIZE"])

    # --- configuration: every mistake that can be found before the processes meet is found here, on every rank
    ds_config, notice = step.resolve_precision(deepspeed_json.load(json_path))
    say(notice)
    assets.fetch(step.demo_assets(config))
    data = build_data(config.data, config.run.seed)
    global_batch, micro_batch, accumulation = deepspeed_json.resolve_batch(
        ds_config, config.optim.micro_batch, world_size
    )
    rank = int(os.environ["RANK"])
    length = len(data.train)  # type: ignore[arg-type]
    sampler = GlobalBatchSampler(length, micro_batch, rank, world_size, config.run.seed)
    total_steps = config.optim.steps
    if total_steps is None:
        assert config.optim.epochs is not None
        total_steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    ds_config = deepspeed_json.resolve(ds_config, config.optim, world_size, total_steps)
    say(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {world_size} ranks = {global_batch} "
        f"pairs a step; {total_steps} steps; negatives from {micro_batch * world_size} pairs"
    )
    if dry_run:
        step.build_models(config, data.vocab_size)
        say(json.dumps({"config": config.to_dict(), "deepspeed": ds_config}, indent=2))
        return

    # --- step
    device = distributed.init()
    try:
        folder = output_folder(config)
        trainer = step.build(config, ds_config, data.vocab_size, total_steps, device)
        loop(config, data, sampler, trainer, total_steps, accumulation, folder, ds_config)
    finally:
        distributed.shutdown()


def loop(config, data, sampler, trainer, total_steps, accumulation, folder, ds_config) -> None:
    import torch

    from ds_cmli import checkpoint, distributed, environment
    from ds_cmli.data import BadSamples, train_loader
    from ds_cmli.metrics import NullWriter, Writer, peak_memory_bytes

    run = config.run
    writer: NullWriter | Writer = NullWriter()
    if distributed.is_main():
        environment.write(folder / "config.json", config, ds_config)
        writer = Writer(folder, total_steps)
    state = checkpoint.TrainState()
    bad = BadSamples(config.data.max_bad_share, len(data.train), data.bad)
    batches = iter(train_loader(data, sampler, config.data.workers))
    names = ["loss", *(f"loss/{name}" for name in config.loss.weights)]
    sums, micro_batches, pairs, since = torch.zeros(len(names), device=trainer.device), 0, 0, time.monotonic()

    while state.step < total_steps:
        for _ in range(accumulation):
            batch = next(batches)
            bad.add(batch.bad)
            total, each = trainer(batch)
            sampler.advance()
            sums += torch.stack([total, *each.values()])
            micro_batches += 1
            pairs += len(batch.index) * distributed.world_size()
        state.step += 1
        writer.advance()

        last = state.step == total_steps
        if last or state.step % run.log_every == 0:
            means = distributed.mean_over_ranks(sums / micro_batches).tolist()  # collective, CPU-GPU sync
            stop_if_too_many_bad(bad, state.step * accumulation * sampler.global_batch)  # collective
            speed = pairs / (time.monotonic() - since)
            writer.log(
                state.step,
                {**dict(zip(names, means, strict=True)), **trainer.state(), "pairs_per_s": round(speed, 1)},
                peak_memory_bytes=peak_memory_bytes(),
            )
            sums.zero_()
            micro_batches, pairs, since = 0, 0, time.monotonic()
        if last or (run.eval_every and state.step % run.eval_every == 0):
            paused = time.monotonic()
            evaluate_all(config, data, trainer, writer, state.step)
            since += time.monotonic() - paused
        if last or (run.save_every and state.step % run.save_every == 0):
            state.sampler = sampler.state_dict()
            checkpoint.save(folder, trainer, state)  # collective

    skipped = sum(distributed.gather_objects(bad.count))  # collective
    if skipped or bad.at_load:
        writer.say(f"skipped {len(bad.at_load)} samples at load and {skipped} in training; the first: {bad.first}")
    writer.close()
    writer.say(f"written to {folder}: config.json, metrics.jsonl, tensorboard/, checkpoint/, student.safetensors")


def evaluate_all(config: Config, data: Any, trainer: Any, writer: Any, step: int) -> None:
    from ds_cmli.evaluate import evaluate, summary

    for split, dataset in data.evals.items():
        found = evaluate(trainer.objective, dataset, data, config.run.eval_batch, trainer.device)  # collective
        writer.log(step, {f"eval/{split}/{name}": value for name, value in found.items()})
        writer.say(summary(split, found))


def stop_if_too_many_bad(bad: Any, seen: int) -> None:
    """Raise on every rank together where broken samples exceed their allowed share. Collective."""
    from ds_cmli import distributed

    every = distributed.gather_objects((bad.count, bad.first))  # collective, a CPU-GPU sync
    count = sum(n for n, _ in every)
    if bad.too_many(count, seen):
        bad.first = [item for _, first in every for item in first]
        raise UserError(bad.message(count))


def output_folder(config: Config) -> Path:
    """The run's folder, made, and the same on every rank."""
    from ds_cmli import distributed

    name = config.run.output_dir or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(distributed.broadcast_object(name))  # collective
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"--output-dir is {str(folder)!r}: cannot write there: {error.strerror}") from None
    return folder


def say(line: str | None) -> None:
    if line and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
