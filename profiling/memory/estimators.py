"""How far memory estimates are off, over a fixed list of settings: `python -m profiling.memory.estimators`

Each setting's step runs on this CPU under PyTorch's allocator. Beside what was measured stand our
prediction, DeepSpeed's own estimators (ZeRO-2 and 3 alone), accelerate's rule (`accelerate
estimate-memory`, training with Adam), and the rule of thumb of 16 bytes a trained parameter. P(OOM)
is the share of settings whose step fails when an estimate is all the memory that there is: the
measured allocations are replayed through the model of CUDA's allocator with that limit.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import plots, quiet
from ds_cmli.common.cli import check_writable, run_command
from ds_cmli.common.errors import UserError
from profiling.scripts import no_label, percent, picture, written

ALL = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}
OURS, DEEPSPEED, ACCELERATE, RULE = "ds-cmli", "DeepSpeed", "accelerate", "16 B a parameter"
SMALLEST = 1e-6  # relative error at the left end of the picture
ESTIMATORS = (OURS, DEEPSPEED, ACCELERATE, RULE)
IMAGE_MODELS = [
    "resnet18",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_dinov3",
]
TEXT_MODELS = ("roberta", "deberta-v2", "t5", "gpt2")  # in addition to bert
OVERRIDES: dict[str, dict[str, Any]] = {  # of those whose configuration has other names than bert's
    "t5": {"d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 512, "d_kv": 32},
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4},
}


@dataclass(frozen=True)
class Setting:
    """One step: what is not the default is what its name says."""

    stage: int = 2
    ranks: int = 1
    batch: int = 16  # pairs a rank
    precision: str = "bf16"
    checkpointing: bool = False
    accumulation: int = 1
    losses: tuple[str, ...] = tuple(ALL)
    positions: int = 32  # M, text positions
    width: int = 128  # of both encoders
    depth: int = 4
    image_size: int = 56
    optimizer: str = "AdamW"
    offload: bool = False  # of the optimizer
    exchange: str = "gather"  # of texts between ranks
    image_model: str = "vit_tiny_patch16_224"
    text_model: str = "bert"

    def name(self) -> str:
        return ", ".join(
            f"{key} {'+'.join(value) if isinstance(value, tuple) else value}"
            for key, value in vars(self).items()
            if key in ("stage", "ranks") or value != getattr(Setting, key)
        )


def settings() -> list[Setting]:
    """The fixed list."""
    out = [
        Setting(stage, ranks, precision=precision, checkpointing=checkpointing)
        for stage in (0, 1, 2, 3)
        for ranks in (1, 2, 8, 64)
        for precision, checkpointing in (("bf16", False), ("fp32", True))
    ]
    out += [Setting(stage, 8, batch=batch) for stage in (1, 2, 3) for batch in (4, 64, 128)]
    alone = ("global", "cmli", "target_cmli", "global_sigmoid", "cmli_sigmoid")
    for losses in (*((name,) for name in alone), ("cmli", "cls_kd")):
        out += [Setting(stage, 2, losses=losses) for stage in (2, 3)]
    out += [
        Setting(2, 2, positions=m, image_size=size) for m, size in ((16, 56), (64, 112), (32, 224))
    ]
    out += [
        Setting(2, 2, width=width, depth=depth) for width, depth in ((64, 2), (256, 6), (384, 4))
    ]
    out += [Setting(stage, 2, accumulation=4) for stage in (1, 2)]
    out += [Setting(2, ranks, optimizer="SGD") for ranks in (1, 8)]
    out.append(Setting(0, 2, optimizer="Adagrad"))
    out += [Setting(stage, 2, offload=True) for stage in (1, 2, 3)]
    out += [Setting(2, 8, exchange="ring"), Setting(3, 8, exchange="ring", accumulation=4)]
    for image_model in IMAGE_MODELS:
        out.append(Setting(2, 2, batch=4, image_size=64, image_model=image_model))
    return out + [Setting(2, 2, text_model=text_model) for text_model in TEXT_MODELS]


@dataclass
class Row:
    """One setting: measured and estimated bytes, and whether the step fails within them."""

    name: str
    measured: int
    estimates: dict[str, int] = field(default_factory=dict)
    fails: dict[str, bool] = field(default_factory=dict)

    def errors(self) -> dict[str, float]:
        return {name: value / self.measured - 1 for name, value in self.estimates.items()}


def rows(chosen: list[Setting]) -> Iterator[Row]:
    from ds_cmli.allocator.allocator import replay
    from ds_cmli.allocator.blocks import OutOfMemory
    from ds_cmli.config.presets import load_preset
    from ds_cmli.memory.predict import Options, predict
    from profiling.memory.measure_cpu import measure_phases, tracked_events

    for setting in chosen:
        tower = {"embed_dim": setting.width, "depth": setting.depth, "num_heads": 4}
        tower["patch_size"] = 14
        text = {"hidden_size": setting.width, "num_hidden_layers": setting.depth, "num_attention_heads": 4,
                "intermediate_size": 4 * setting.width}  # fmt: skip
        student = {
            "image_model": setting.image_model, "text_model": setting.text_model, "embed_dim": 64,
            "image_overrides": tower if setting.image_model == Setting.image_model else {},
            "text_overrides": OVERRIDES.get(setting.text_model, text),
        }  # fmt: skip
        if setting.image_model == Setting.image_model:
            student["layers"] = setting.depth
        config = load_preset("tiny", {
            "student": student,
            "teacher": {"overrides": {**tower, "patch_size": setting.image_size // 4}},
            "data": {"image_size": setting.image_size, "context_length": setting.positions},
            "loss": {"weights": dict.fromkeys(setting.losses, 1.0), "cmli_exchange": setting.exchange},
            "optim": {"micro_batch": setting.batch},
        })  # fmt: skip
        params = {"torch_adam": True} if setting.optimizer == "AdamW" else {"lr": 1e-3}
        ds_config: dict[str, Any] = {
            "gradient_accumulation_steps": setting.accumulation,
            "optimizer": {"type": setting.optimizer, "params": params},
            "zero_optimization": {"stage": setting.stage, "reduce_bucket_size": 500_000},
            "zero_allow_untested_optimizer": True,
        }
        if setting.precision != "fp32":
            ds_config[setting.precision] = {"enabled": True}
        if setting.offload:
            ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            ds_config["zero_force_ds_cpu_optimizer"] = False
        if setting.checkpointing:
            ds_config["activation_checkpointing"] = {}
        measured = max(measure_phases(config, ds_config, setting.ranks).values())
        options = Options(backend="fake")
        prediction = predict(config, ds_config, setting.ranks, target="cpu", options=options)
        trained, largest = prediction.parameters, prediction.largest_module
        row = Row(setting.name(), measured, {OURS: prediction.report.totals["requested"]})
        if setting.stage >= 2:
            sizes = (trained, largest, setting.ranks)
            row.estimates[DEEPSPEED] = deepspeed_estimate(setting.stage, *sizes, setting.offload)
        row.estimates[ACCELERATE] = accelerate_estimate(trained, setting.precision)
        row.estimates[RULE] = 16 * trained
        limits = {**row.estimates, OURS: replay(prediction.events).reserved_peak}
        events = tracked_events(config, ds_config, setting.ranks)
        for name, limit in limits.items():
            try:
                replay(events, limit=limit)
                row.fails[name] = False
            except OutOfMemory:
                row.fails[name] = True
        yield row


def deepspeed_estimate(
    stage: int, trained: int, largest: int, ranks: int, offload: bool = False
) -> int:
    """Bytes that DeepSpeed's own functions estimate for stage 2 or 3; for others it has none.

    They count parameters, gradients and optimizer states: those of a GPU, with `offload` of a GPU
    and of its share of the host, as both are this CPU's memory here.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if stage == 2:
        host, gpu = estimate_zero2_model_states_mem_needs(trained, ranks, 1, cpu_offload=offload)
    else:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            trained, largest, ranks, 1, offload, False
        )
    return gpu + (host // ranks if offload else 0)


def accelerate_estimate(trained: int, precision: str) -> int:
    """The peak that `accelerate estimate-memory` prints for training with Adam."""
    try:
        from accelerate.commands.estimate import estimate_training_usage
    except ImportError:
        raise UserError(
            "accelerate is not installed: pip install accelerate, whose estimate is compared"
        ) from None
    named = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    return max(estimate_training_usage(4 * trained, named).values())


def summary(
    measured: list[Row], names: tuple[str, ...] = ESTIMATORS
) -> dict[str, dict[str, float]]:
    """Of each estimator: settings, median and maximum of the relative error's size, how many
    estimates are exact, the share that is too low, and P(OOM).
    """
    out = {}
    for name in names:
        errors = [row.errors()[name] for row in measured if name in row.estimates]
        if not errors:
            continue
        sizes = [abs(error) for error in errors]
        out[name] = {
            "settings": len(errors),
            "median_relative_error": statistics.median(sizes),
            "maximum_relative_error": max(sizes),
            "exact": sizes.count(0),
            "too_low": sum(error < 0 for error in errors) / len(errors),
            "p_oom": sum(row.fails[name] for row in measured if name in row.fails) / len(errors),
        }
    return out


@click.command()
@click.option("--first", type=click.IntRange(1), help="Only so many of the settings.")
@click.option("--plot", metavar="FILE", help="The errors as a picture; needs matplotlib.")
@click.option("--json", "json_file", metavar="FILE", help="Write every figure to this file.")
def command(first: int | None, plot: str | None, json_file: str | None) -> None:
    """Compare memory estimates with measured memory over a fixed list of settings."""
    plots.check_picture("--plot", plot)
    if json_file is not None:
        check_writable(json_file)
    quiet.silence()
    table_rows = []
    for row in rows(settings()[:first]):
        table_rows.append(row)
        errors = "  ".join(f"{name} {error:+8.2%}" for name, error in row.errors().items())
        click.echo(f"{row.measured:13,} B  {errors}  {row.name}")
    table = summary(table_rows)
    click.echo(f"\n{'':18} settings   median error   maximum error   too low   P(OOM)")
    for name, values in table.items():
        click.echo(
            f"{name:18} {values['settings']:8}   {values['median_relative_error']:12.4%}"
            f"   {values['maximum_relative_error']:13.4%}   {values['too_low']:7.1%}   {values['p_oom']:6.1%}"
        )
    if json_file is not None:
        content = {"rows": [vars(row) for row in table_rows], "summary": table}
        Path(json_file).write_text(json.dumps(content, indent=2) + "\n")
    if plot is not None:
        draw(table, Path(plot))


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Of each estimator a bar from its median to its largest relative error, and the share of
    steps that fail.
    """
    figure, axis = picture(0.42 * len(table) + 1.4)
    shown = {"median": "median_relative_error", "largest": "maximum_relative_error"}
    for place, (name, values) in enumerate(table.items()):
        colour = plots.ACCENT if name == OURS else plots.SOFT
        ends = [max(values[column], SMALLEST / 4) for column in shown.values()]
        axis.plot(ends, [place, place], color=colour, linewidth=5, alpha=0.35)
        for end in ends:
            marker = "o" if end >= SMALLEST else "<"  # an arrow: it lies farther left
            axis.plot(end, place, marker, color=colour, markersize=8)
        side = {"median": ("right", -9), "largest": ("left", 9)}
        for (word, column), end in zip(shown.items(), ends, strict=True):
            text, (align, shift) = f"{word} {rounded(values[column])}", side[word]
            look = {"textcoords": "offset points", "va": "center", "ha": align, "size": 9}
            axis.annotate(text, (end, place), (shift, 0), **look)
        beside = {"transform": axis.get_yaxis_transform(), "ha": "right"}
        axis.text(1.18, place, f"{values['p_oom']:.0%}", va="center", weight="bold", **beside)
    axis.text(1.18, -0.75, "steps that fail", size=9, color=plots.SOFT, **beside)
    axis.set_yticks(
        range(len(table)), [f"{name} ({values['settings']:.0f})" for name, values in table.items()]
    )
    axis.set(xscale="log", xlim=(SMALLEST / 2000, 300), ylim=(len(table) - 0.5, -0.9))
    axis.set_xticks([1e-6, 1e-4, 1e-2, 1])
    axis.xaxis.set_major_formatter(percent)
    axis.xaxis.set_minor_formatter(no_label)
    axis.grid(axis="x")
    most = rounded(table[OURS]["maximum_relative_error"]) if OURS in table else ""
    others = [values["median_relative_error"] for name, values in table.items() if name != OURS]
    finding = f"Our prediction is off by at most {most}, others by {min(others):.0%} to {max(others):.0%} in the median"
    caption = "relative error of the memory of a step; in brackets the number of settings"
    written(figure, path, finding, caption)


def rounded(share: float) -> str:
    """A relative error as percent: with one decimal from 0.1% on, else up to its first digit."""
    if share < SMALLEST / 2:
        return "0%"
    return f"{share:.1%}" if share >= 0.001 else f"{float(f'{100 * share:.1g}'):.6g}%"


if __name__ == "__main__":
    run_command(command)
