"""A checkpoint of one ZeRO stage and precision goes on at another: weights, moments and losses."""

import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.checkpoint.start import RunStart
from ds_cmli.checkpoint.weights import collect_weights
from ds_cmli.hardware import bf16_is_fast
from tests import make

Layout = tuple[int, str]  # ZeRO stage, precision
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}},
              "fp16": {"fp16": {"enabled": True, "initial_scale_power": 9}}}  # fmt: skip
# Each stage and each precision before and after another.
CHANGES = [((1, "bf16"), (2, "bf16")), ((2, "bf16"), (3, "bf16"))]
SLOW = [((3, "bf16"), (1, "fp16")), ((1, "fp16"), (3, "fp32")), ((3, "fp32"), (2, "bf16")), ((2, "fp16"), (1, "fp16"))]
CHANGES += [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW]
SETTINGS = {"optim.warmup_share": 0.0, "optim.ema_decay": 0.9}


def whole(train_engine) -> dict:
    """Everything that an update depends on, whole, whatever the layout. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = train_engine.engine
    weights = {name: value.clone() for name, value in collect_weights(train_engine).items()}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 do so in their next step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    moments = {}
    for name, parameter in train_engine.objective.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone().flatten()
        if not hasattr(parameter, "ds_id"):  # what the next forward pass uses
            assert torch.equal(parameter.detach().float(), weights[name].to(parameter.dtype).float())
    groups = [{k: g[k] for k in ("lr", "initial_lr", "betas", "eps", "weight_decay")}
              for g in engine.optimizer.param_groups]  # fmt: skip
    steps = {float(state["step"]) for state in engine.optimizer.state.values()}
    counters = [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.lr_scheduler.last_epoch]
    with train_engine.ema.as_master_weights():
        averages = {name: value.clone() for name, value in collect_weights(train_engine).items()}
    scale = {name: vars(engine.optimizer.loss_scaler).get(name) for name in ("cur_scale", "cur_iter")}
    shared = repr((groups, steps, counters))
    return {"weights": weights, "averages": averages, "moments": moments, "shared": shared, "scale": scale}


def trained(folder: Path, layout: Layout, *words: str, saved_at: int = 2) -> dict:
    """Return what the engine holds after step `saved_at` of four or once it is loaded, and the last two losses."""
    stage, precision = layout
    content = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
    options = {"--deepspeed_config": make.json_file(folder / "ds.json", content), "--output-dir": folder / "run"}
    options |= {"--steps": 4, "--save-every": 2, "--keep": 3, "--log-every": 1}
    held: dict[str, object] = {}
    restore = RunStart.restore
    save = Checkpoints.save

    def restored(start, engine, *arguments):
        restore(start, engine, *arguments)
        if start.checkpoint is not None:
            held.update(whole(engine))

    def saved(checkpoints, state):
        if state.step == saved_at:
            held.update(whole(checkpoints.engine))
        return save(checkpoints, state)

    with mock.patch.object(RunStart, "restore", restored), mock.patch.object(Checkpoints, "save", saved):
        assert make.train(*make.small(options, SETTINGS), *words) == 0
    assert not list((folder / "run" / "checkpoint").glob("*.writing"))
    return held | {"losses": [line["loss"] for line in make.lines(folder / "run")][-2:]}


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The options to go on from a run of a layout, trained once, and what it held."""

    def write(layout):
        folder = tmp_path_factory.mktemp("written")
        record = trained(folder, layout, *source)
        return [*source, "--resume", f"{folder}/run/checkpoint/step2", "--resume-with-changes"], record

    return functools.cache(write)


@pytest.mark.parametrize("before, after", CHANGES, ids=str)
def test_each_stage_and_precision_goes_on_at_another(written, before, after, fp16_device, tmp_path):
    """Weights and moments to the bit, and losses of about 6.5 within a limit.

    Another precision rounds the cosines otherwise, by up to 2^-8, and CMLI's logits are 50 times these: 0.2 a logit. So
    does ZeRO-3's own linear layer on a processor without instructions for bf16.
    """
    go_on, record = written(before)
    resumed = trained(tmp_path, after, *go_on)
    assert resumed["shared"] == record["shared"]
    assert before[1] != after[1] or resumed["scale"] == record["scale"]
    for kind in ("weights", "averages", "moments"):
        assert_close(resumed[kind], record[kind], rtol=0, atol=0)
    limit = 0.5
    if before[1] == after[1] == "bf16":
        limit = 0.03 if bf16_is_fast() else 0.3
    assert resumed["losses"] == pytest.approx(record["losses"], rel=0, abs=limit)


@pytest.mark.slow
def test_a_run_goes_from_stage_2_to_3_to_1(written, source, tmp_path, capfd):
    saved = trained(tmp_path / "3", (3, "bf16"), *written((2, "bf16"))[0], saved_at=4)
    go_on = ["--resume", f"{tmp_path}/3/run/checkpoint/step4", "--resume-with-changes", "--steps", "6"]
    loaded = trained(tmp_path / "1", (1, "bf16"), *source, *go_on)
    assert capfd.readouterr().out.count("from 1 ranks to 1: through a universal checkpoint") == 2
    for kind in ("weights", "averages", "moments"):
        assert_close(loaded[kind], saved[kind], rtol=0, atol=0)


def test_what_does_not_fit_is_one_line(written, tmp_path):
    problem = "step2: does not fit the model and the optimizer of this start: "
    for stage in (1, 2):  # converted, and as it is
        words = [*written((2, "fp32"))[0], "--set", "student.embed_dim=24"]
        assert problem in make.refused(trained, tmp_path, (stage, "fp32"), *words)
