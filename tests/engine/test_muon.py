"""Muon as DeepSpeed has it: its matrices, the same at every stage and on one and two ranks, its memory."""

import json

import pytest
from safetensors.torch import load_file

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.engine.parameter_groups import MuonRates
from ds_cmli.memory.inputs import without_weights
from tests.checkpoint.test_restore import ranks
from tests.config.test_mistakes import pairs
from tests.conftest import ROOT
from tests.drive_train import drive
from tests.stranger.drive import ONE_BLOCK

pytestmark = pytest.mark.usefixtures("alone")
STEPS, BATCH = 3, 8
SCALARS = 256  # bytes: the few numbers that operators and the engine hold for a moment


def content(stage: int, precision: str = "fp32", **more) -> dict:
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    optimizer = {"type": "Muon", "params": {"muon_lr": 0.02}}
    return {"optimizer": optimizer, "zero_optimization": {"stage": stage}, "gradient_clipping": 0, **half, **more}


def tasks(tmp_path, cells, world_size: int) -> list[dict]:
    """A run of each cell (stage, precision), in folders named by it."""
    out: list[dict] = []
    for stage, precision in cells:
        name = f"{world_size}-{stage}-{precision}"
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content(stage, precision)))
        given = ["--preset", "tiny", "--steps", str(STEPS), "--log-every", "1", "--data", str(tmp_path / "pairs")]
        given += ["--deepspeed_config", str(file), "--micro-batch", str(BATCH // world_size), "--lr", "1e-3"]
        given += ["--set", "optim.ema_decay=0.9", "--set", "run.match_maps=0", *ONE_BLOCK]
        out.append({"arguments": [*given, "--output-dir", str(tmp_path / name)]})
    return out


CELLS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]
QUICK = {1: [(0, "fp32"), (1, "bf16"), (3, "fp32")], 2: [(2, "fp32"), (3, "bf16")]}


@pytest.mark.slow
@pytest.mark.parametrize("cells", [QUICK, pytest.param({1: CELLS, 2: CELLS}, marks=pytest.mark.soak)], ids=["", "all"])
def test_the_same_at_every_stage_and_on_two_ranks(tmp_path, cells):
    pairs(tmp_path / "pairs", count=63)
    for world_size, some in cells.items():
        codes, _ = ranks(tmp_path, world_size, tasks(tmp_path, some, world_size), timeout=3000)
        assert codes == [0] * len(some)
    alone = load_file(tmp_path / "1-0-fp32" / "student.safetensors")
    for world_size, some in cells.items():
        for stage, precision in some:
            name = f"{world_size}-{stage}-{precision}"
            weights = load_file(tmp_path / name / "student.safetensors")
            far = max(((weights[key] - x).norm() / x.norm()).item() for key, x in alone.items() if x.dim() == 2)
            print(f"{name}: largest relative difference of a matrix {far:.1e}")
            # Where a gradient is rounding alone, as bf16's often is, Muon makes an update of full size of it.
            assert precision == "bf16" or far < 1e-4, name


@pytest.mark.parametrize("stage, after", [(2, 3), (0, 1)])
def test_another_stage_is_refused_in_one_line(tmp_path, stage, after, capfd):
    given, file = (
        ["--data", pairs(tmp_path / "pairs", count=33), "--output-dir", str(tmp_path / "run")],
        tmp_path / "ds",
    )
    given += ["--preset", "tiny", "--steps", "3", "--deepspeed_config", str(file), "--resume-with-changes"]
    file.write_text(json.dumps(content(stage)))
    assert drive(given, stop_at=1) == 85
    file.write_text(json.dumps(content(after)))
    assert drive(given, mistakes=True) == 2
    out = capfd.readouterr()
    assert "step1: cannot be converted to other ranks, ZeRO stage or precision: " in out.out + out.err
    file.write_text(json.dumps({**content(stage), "optimizer": {"type": "AdamW"}}))
    assert drive(given, mistakes=True) == 2
    assert "does not fit the model and the optimizer of this start" in capfd.readouterr().out


def test_the_shipped_file_trains(tmp_path, capfd):
    given = ["--preset", "tiny", "--steps", "2", "--output-dir", str(tmp_path / "run")]
    given += ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2_muon.json")]
    assert drive(given) == 0
    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_hidden_matrices_alone_are_its():
    config = load_preset("tiny", {})
    objective, _ = engine.build_models(*without_weights(config))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = engine.parameter_groups(objective, 0.05, config.optim, 1e-3, MuonRates(20.0, 0.5))
    assert [(group["use_muon"], group["lr"], group["weight_decay"]) for group in groups] == [
        (True, 0.02, 0.05),
        (False, 5e-4, 0.05),
        (False, 5e-4, 0.0),
    ]
    matrices, convolutions, others = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"student.projection.weight", "student.image.model.blocks.0.attn.qkv.weight"} <= matrices
    assert convolutions == {"student.image.model.patch_embed.proj.weight"}
    assert not any("embed" in name or "token" in name or "norm" in name or "bias" in name for name in matrices)
    expected = {"student.image.model.cls_token", "student.image.model.pos_embed", "losses.cmli.logit_scale"}
    assert expected <= others and any("word_embeddings" in name for name in others)


@pytest.mark.parametrize(
    "more, line",
    [
        (
            {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}},
            "gradient_clipping is 1.0: at stage 2 DeepSpeed",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_scatter": True}},
            "zero_optimization.reduce_scatter is true: Muon n",
        ),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "data_types.grad_accum_dtype is 'fp32': with it DeepSpeed does not orthogonalize Muon",
        ),
        (
            {
                "zero_optimization": {"stage": 2},
                "fp16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "data_types.grad_accum_dtype is 'fp32': with it DeepSpeed does not orthogonalize Muon",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "optimizer.type is 'Muon': its states cannot be offloaded here: leave out",
        ),
        (
            {"optimizer": {"type": "Muon", "params": {"momentum": 1}}},
            "optimizer.params.momentum is 1: Input should be l",
        ),
        ({"optimizer": {"type": "muon", "params": {"ns_method": "svd"}}}, "optimizer.params.ns_method is 'svd': give"),
        (
            {"optimizer": {"type": "Muon", "params": {"torch_adam": False}}},
            "optimizer.params.torch_adam is False: give",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "optimizer.params.muon_lr is 0.02 and scheduler.type is 'WarmupLR', which sets one rate for all parameters",
        ),
    ],
)
def test_what_cannot_be_is_one_line(more, line):
    config = load_preset("tiny", {})
    with pytest.raises(UserError, match=f"^{line}") as error:
        engine.filled(config, DeepSpeedConfig.of({**content(0), **more}), 1, STEPS)
    assert "\n" not in str(error.value)


def test_what_is_filled_for_it():
    options = content(3)
    del options["gradient_clipping"]
    filled = DeepSpeedConfig.of(options).filled(load_preset("tiny", {}).optim, 1, STEPS)
    assert filled["gradient_clipping"] == 0 and filled.zero["reduce_scatter"] is False
    assert filled.notices == (
        "gradient_clipping is 0 with Muon at stage 3, where DeepSpeed would clip its orthogonalized updates",
    )
    del options["zero_optimization"]
    assert DeepSpeedConfig.of(options).filled(load_preset("tiny", {}).optim, 1, STEPS)["gradient_clipping"] == 1
