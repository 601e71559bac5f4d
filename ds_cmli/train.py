"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. Reads top to bottom:
configuration -> processes -> resume -> step -> loop.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
import os  # noqa: E402
from datetime import datetime  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli import preemption  # noqa: E402
from ds_cmli.cli import GroupedCommand, option, run_command  # noqa: E402
from ds_cmli.config import Config  # noqa: E402
from ds_cmli.errors import UserError  # noqa: E402
from ds_cmli.options import OUTPUT, WHAT, add, resolve_config  # noqa: E402


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@add(*WHAT, *OUTPUT)
@option("Checkpoints", "--resume", default="auto", show_default=True, metavar="auto|never|PATH",
        help="auto: go on with the run that --output-dir holds. PATH: start from another one.")  # fmt: skip
@option("Checkpoints", "--resume-with-changes", is_flag=True, help="Also where settings differ from the run's.")
@option("DeepSpeed", "--dry-run", is_flag=True, help="Check everything, print the resolved configuration, and stop.")
@option("DeepSpeed", "--deepspeed", is_flag=True, hidden=True)  # passed by habit; the JSON is always read
@option("DeepSpeed", "--local_rank", type=int, hidden=True)  # passed by the deepspeed launcher; the same in LOCAL_RANK
def command(preset: str, deepspeed_config: str, settings: tuple[str, ...], resume: str, resume_with_changes: bool,
            dry_run: bool, **options: Any) -> int:  # fmt: skip
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI losses.

    With no options it trains the preset "demo" to its end. On TERM, USR1, USR2 or INT it saves and ends with exit
    code 85; started again in the same way, it goes on.
    """
    config = resolve_config(preset, settings, options)
    return train(config, deepspeed_config, dry_run, resume, resume_with_changes)


def train(config: Config, json_path: str, dry_run: bool, resume: str, with_changes: bool) -> int:
    """Returns the exit code: 0 at the end of the run, `preemption.EXIT_CODE` where it is to be started again."""
    from ds_cmli import quiet

    quiet.silence()
    from ds_cmli import deepspeed_json, determinism, distributed, resuming, step
    from ds_cmli.data import BadSamples, GlobalBatchSampler, assets, build_data
    from ds_cmli.metrics import NullWriter, Writer
    from ds_cmli.run import Run

    # --- configuration: on every rank, before the processes meet
    distributed.map_launcher_environment()
    world_size = int(os.environ["WORLD_SIZE"])
    if config.run.deterministic:
        determinism.enforce()
    ds_config, notice = step.resolve_precision(deepspeed_json.load(json_path))
    say(notice)
    assets.fetch(step.demo_assets(config))
    data = build_data(config.data, config.run.seed)

    # --- processes, and what there is to go on from
    device = None if dry_run else distributed.init()
    try:
        folder, found = Path(), None
        if not dry_run:
            folder = output_folder(config, resume)
            found = resuming.find(resume, folder)  # collective
        ds_config = resuming.cut_batch(found, ds_config)
        batch = deepspeed_json.resolve_batch(ds_config, config.optim.micro_batch, world_size)
        global_batch, micro_batch, accumulation = batch
        length = len(data.train)  # type: ignore[arg-type]
        sampler = GlobalBatchSampler(length, micro_batch, int(os.environ["RANK"]), world_size, config.run.seed)
        total_steps = config.optim.steps
        if total_steps is None:
            assert config.optim.epochs is not None
            total_steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
        ds_config = deepspeed_json.resolve(ds_config, config.optim, world_size, total_steps)
        say(
            f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {world_size} ranks = {global_batch} "
            f"pairs a step; {total_steps} steps; negatives from {micro_batch * world_size} pairs"
        )
        if device is None:
            step.build_models(config, data.vocab_size)
            say(json.dumps({"config": config.to_dict(), "deepspeed": ds_config}, indent=2))
            return 0
        state = resuming.state_of(found, config, ds_config, with_changes, say)
        if state.step >= total_steps and state.evaluated:
            say(f"the run in {folder} is finished, {state.step} steps: give another --output-dir to start a new one")
            return 0

        # --- step
        trainer = step.build(config, resuming.for_engine(found, ds_config), data.vocab_size, total_steps, device)
        bad = BadSamples(config.data.max_bad_share, length, data.bad)
        own = resuming.load(found, trainer, sampler, bad, with_changes)  # collective
        resuming.settle(resume, found, folder, config, ds_config)  # collective
        writer = Writer(folder, total_steps, state.step) if distributed.is_main() else NullWriter()
        return loop(
            Run(config, data, sampler, trainer, total_steps, accumulation, folder, state, own, bad, writer)
        )  # collective
    finally:
        distributed.shutdown()


def loop(run: Any) -> int:
    """Train to the end, `run` being a `ds_cmli.run.Run`. Collectives in every call."""
    from ds_cmli.data import train_loader

    settings, state = run.config.run, run.state
    loader = train_loader(run.data, run.sampler, run.config.data.workers)
    loader.worker_init_fn = preemption.shield
    batches = iter(loader)
    due = state.step == run.total_steps  # the run was stopped in its last evaluation
    try:
        while True:
            if not state.evaluated:
                run.evaluate()
            if due:
                run.save()
            if state.step == run.total_steps:
                break
            timed = run.train_step(batches)
            last = state.step == run.total_steps
            if last or state.step % settings.log_every == 0:
                run.log()
            state.evaluated = not (last or (settings.eval_every and state.step % settings.eval_every == 0))
            due = timed or last or bool(settings.save_every and state.step % settings.save_every == 0)
    except preemption.Preempted:
        run.stop()
        return preemption.EXIT_CODE
    run.finish()
    return 0


def output_folder(config: Config, resume: str) -> Path:
    """The run's folder, made, and the same on every rank."""
    from ds_cmli import distributed, resuming

    name = resuming.run_folder(resume, config.run.output_dir)
    name = name or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}"
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
    preemption.install()
    run_command(command)


if __name__ == "__main__":
    main()
