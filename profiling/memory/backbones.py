"""python -m profiling.memory.backbones [NAME ...] [--stage 2] [--checkpointing] [--precision fp32]

Backbones of all kinds with random weights in small sizes: each trains two steps on the demo's
scenes, is evaluated, and its memory is predicted and compared with what PyTorch's allocator gives a real step,
or it is refused in one line. Ends with exit code 1 where neither is so. Without names all are
tried, in ten minutes or so.
"""

import contextlib
import gc
import io
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import click
import torch

from ds_cmli import engine
from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.data.load import Data, build_data
from ds_cmli.evaluate.embed import EmbedSettings
from ds_cmli.evaluate.split import evaluate_split
from ds_cmli.memory.fake import process_group
from ds_cmli.memory.predict import Options, predict
from profiling.memory.measure_cpu import measure_phases
from profiling.scripts import Table

BATCH, STEPS, PAIRS = 4, 2, 8
# Bytes that the predicted may differ by: the few numbers that operators and the engine hold for a
# moment.
EQUAL = 256
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
CNN = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}


@dataclass(frozen=True)
class Case:
    model: str
    overrides: dict[str, Any] = field(default_factory=dict)
    size: int = 64  # of the picture
    settings: dict[str, Any] = field(default_factory=dict)  # of the section `student`, or `teacher`


IMAGES = (
    Case("vit_tiny_patch16_224", VIT),
    Case("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}),
    Case("vit_base_patch16_clip_224", VIT),
    Case("vit_medium_patch16_gap_240", VIT),
    Case("vit_betwixt_patch16_reg4_gap_256", VIT),
    Case("vit_base_patch16_siglip_224", VIT),
    Case("vit_base_patch16_siglip_gap_224", VIT),
    Case("vit_tiny_patch16_224", {**VIT, "patch_size": [16, 8]}),
    Case("vit_relpos_small_patch16_224", VIT),
    Case("flexivit_small", VIT),
    Case("vit_tiny_patch16_224", {**VIT, "use_naflex": True}),
    Case("naflexvit_base_patch16_gap", VIT),
    Case("deit_tiny_distilled_patch16_224", VIT),
    Case("deit3_small_patch16_224", VIT),
    Case("beit_base_patch16_224", VIT),
    Case("beitv2_base_patch16_224", VIT),
    Case("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}),
    Case("vit_small_patch16_dinov3", VIT),
    Case("cait_xxs24_224", VIT),
    Case("convit_tiny", {**VIT, "local_up_to_layer": 1}),
    Case("swin_tiny_patch4_window7_224", SWIN),
    Case("swinv2_tiny_window8_256", SWIN),
    Case("convnext_atto", CNN),
    Case("convnextv2_atto", CNN),
    Case("inception_next_atto", CNN),
    Case("resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}),
    Case("resnet26t", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}),
    Case("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}),
    Case("efficientnet_lite0"),
    Case("mobilenetv3_small_050"),
    Case("regnety_002"),
    Case("mixer_s16_224", settings={"layers": 2}),
    Case("convmixer_768_32", size=56, settings={"layers": 2}),
    Case("xcit_nano_12_p16_224", VIT),
    Case("poolformer_s12"),
    Case("pvt_v2_b0", {"depths": [1, 1, 1, 1]}),
    Case("hiera_tiny_224", {"embed_dim": 16, "stages": [1, 1, 1, 1]}, size=224),
    Case("levit_128", size=128),
    Case("crossvit_9_240"),
    Case("vit_tinny_patch16_224"),
    Case("mixer_s16_224", {"embed_dim": 32}),
    Case("swin_tiny_patch4_window7_224", SWIN, settings={"layers": 2}),
    Case("resnet18", {"layers": [1, 1, 1, 1]}, size=80),
)
TEACHERS = (
    Case("vit_small_patch16_dinov3", VIT),
    Case("beitv2_base_patch16_224", VIT),
    Case("vit_base_patch16_siglip_224", VIT),
    Case("swin_tiny_patch4_window7_224", SWIN),
    Case("convnext_atto", CNN),
    Case(
        "resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}, settings={"block": -2}
    ),
    Case("resnet18", {"layers": [1, 1, 1, 1]}, settings={"block": 9}),
)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}
TEXTS = (
    Case("bert", SMALL),
    Case("roberta", SMALL),
    Case("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    Case("mpnet", SMALL),
    Case("electra", {**SMALL, "embedding_size": 16}),
    Case("albert", {**SMALL, "embedding_size": 16}),
    Case("deberta", SMALL),
    Case("deberta-v2", SMALL),
    Case("deberta-v2", {**SMALL, "relative_attention": True, "position_biased_input": False, "share_att_key": True,
                        "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}),
    Case("xlm-roberta", SMALL),
    Case("camembert", SMALL),
    Case("modernbert", SMALL),
    Case("nomic-bert", SMALL),
    Case("t5", T5),
    Case("mt5", T5),
    Case("umt5", T5),
    Case("clip", SMALL),
    Case("siglip", SMALL),
    Case("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    Case("qwen2", {**SMALL, "num_key_value_heads": 2}),
    Case("opt", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
                 "word_embed_proj_dim": 32}),
    Case("ernie", SMALL),
    Case("fnet", {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}),
    Case("bart"),
    Case("vit"),
    Case("albert", {**SMALL, "num_hiden_layers": 2}),
)  # fmt: skip


@dataclass
class Row:
    kind: str
    case: Case
    backbone: str = ""
    shape: str = ""  # N and H of an image encoder, H of a text encoder
    blocks: int = 0  # under activation checkpointing
    losses: list[float] = field(default_factory=list)
    recall: float = float("nan")
    idle: int = 0  # parameters that no gradient reaches
    predicted: int = 0
    measured: int = 0
    refused: str = ""
    failed: str = ""  # an error that is no refusal
    said: str = ""  # lines that the student was built with

    @property
    def good(self) -> bool:
        trained = (
            len(self.losses) == STEPS
            and all(loss == loss for loss in self.losses)
            and not self.idle
        )
        equal = abs(self.predicted - self.measured) <= EQUAL
        return not self.failed and (bool(self.refused) or (trained and equal))


def deepspeed_json(stage: int, checkpointing: bool, precision: str) -> dict[str, Any]:
    return {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        **({precision: {"enabled": True}} if precision != "fp32" else {}),
        **({"activation_checkpointing": {}} if checkpointing else {}),
    }


def configuration(kind: str, case: Case) -> Config:
    data: dict[str, Any] = {"image_size": 56 if kind == "text" else case.size, "context_length": 24}
    losses: dict[str, Any] = {"weights": dict.fromkeys(("global", "cmli", "target_cmli"), 1.0)}
    # The teacher has another grid and another width than most of the students.
    teacher: dict[str, Any] = {
        "overrides": {**VIT, "embed_dim": 48, "patch_size": data["image_size"] // 2}
    }
    if kind == "teacher":
        student: dict[str, Any] = {"image_overrides": VIT}
        teacher = {"model": case.model, "overrides": case.overrides, **case.settings}
    else:
        student = {
            f"{kind}_model": case.model,
            f"{kind}_overrides": case.overrides,
            **case.settings,
        }
    sections = {"student": student, "teacher": teacher, "data": data, "loss": losses}
    return load_preset("tiny", {**sections, "optim": {"micro_batch": BATCH}})


def tried(kind: str, case: Case, json: dict[str, Any]) -> Row:
    """One backbone, trained, evaluated and predicted, as rank 0 of one."""
    row, config = Row(kind, case), configuration(kind, case)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            data = build_data(config.data, 0)
            train(row, config, data, json)
            row.measured = max(measure_phases(config, json).values())
            row.predicted = predict(
                config, json, 1, target="cpu", options=Options(backend="fake")
            ).report.totals["requested"]
    except UserError as error:
        row.refused = str(error)
    except RuntimeError as error:
        row.failed = str(error).partition("\n")[0]
    gc.collect()  # engines hold themselves in circles
    own = [
        line for line in out.getvalue().splitlines() if kind == "teacher" or "teacher." not in line
    ]
    row.said = "; ".join(dict.fromkeys(own))
    return row


def train(row: Row, config: Config, data: Data, json: dict[str, Any]) -> None:
    resolved = engine.filled(config, engine.on_this_device(DeepSpeedConfig.of(json)), 1, 10)
    with process_group(1):
        step = engine.build(
            config, resolved, data.vocab_size, 10, torch.device("cpu"), data.special
        )
        student = step.objective.student
        owner: Any = step.teacher if row.kind == "teacher" else student
        encoder = getattr(owner, "text" if row.kind == "text" else "image")
        row.backbone, row.blocks = type(encoder).__name__, len(encoder.blocks)
        places = f"{encoder.grid[0]} x {encoder.grid[1]}, " if row.kind != "text" else ""
        row.shape = f"{places}{encoder.width}"
        reached: set[str] = set()

        def note(gradient: torch.Tensor, name: str) -> None:
            if gradient.abs().sum():
                reached.add(name)

        for name, parameter in step.objective.named_parameters():
            parameter.register_hook(partial(note, name=name))
        for start in range(0, STEPS * BATCH, BATCH):
            batch = data.collate([data.train[i] for i in range(start, start + BATCH)])
            row.losses.append(step(batch)[0].item())
        trained = [name for name, x in encoder.named_parameters() if x.requires_grad]
        row.idle = sum(f"student.{row.kind}.{name}" not in reached for name in trained)
        some = torch.utils.data.Subset(data.evals["seen"], range(PAIRS))
        how = EmbedSettings(BATCH, torch.device("cpu"))
        row.recall = evaluate_split(step.objective, some, data, how)["combined/i2t_r5"]


@click.command(help=__doc__.splitlines()[2])
@click.argument("names", nargs=-1)
@click.option("--stage", default=2, show_default=True, help="Of ZeRO.")
@click.option("--checkpointing", is_flag=True, help="Activation checkpointing of the blocks.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
def main(names: tuple[str, ...], stage: int, checkpointing: bool, precision: str) -> None:
    json = deepspeed_json(stage, checkpointing, precision)
    rows = []
    for kind, cases in (("image", IMAGES), ("text", TEXTS), ("teacher", TEACHERS)):
        for case in cases:
            if names and case.model not in names:
                continue
            rows.append(tried(kind, case, json))
            verdict = "ok " if rows[-1].good else "BAD"
            why = f"{rows[-1].refused}{rows[-1].failed}"
            click.echo(f"{verdict} {kind} {case.model} {why}", err=True)
    head = ["", "model", "backbone", "N, H", "blocks", "loss of steps", "R@5", "idle"]
    head += ["predicted B", "measured B", "said"]
    lines = [
        [row.kind, row.case.model, row.backbone, row.shape, row.blocks, ", ".join(f"{x:.3f}" for x in row.losses),
         f"{row.recall:.2f}", row.idle, f"{row.predicted:,}", f"{row.measured:,}", row.said]
        for row in rows if not row.refused
    ]  # fmt: skip
    cells = [list(map(str, line)) for line in lines]
    click.echo(Table("Trained, evaluated, predicted", head, cells).markdown())
    refused = [[row.kind, row.case.model, row.refused] for row in rows if row.refused]
    click.echo(Table("Refused", ["", "model", "why"], refused).markdown())
    bad = [row for row in rows if not row.good]
    click.echo(
        f"{len(lines) - len(bad)} of {len(lines)} trained and predicted, {len(rows) - len(lines)} refused"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_command(main)
