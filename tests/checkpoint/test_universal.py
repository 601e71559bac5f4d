"""A checkpoint of one ZeRO stage, number of ranks and precision goes on at another: weights, moments and losses."""

import functools
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ds_cmli import engine
from ds_cmli.checkpoint import resume
from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.checkpoint.weights import full_averages, full_weights
from ds_cmli.common import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.data.pairs import BadSamples
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.hardware import bf16_is_fast
from tests import make

BATCH, STEPS = 8, 6  # pairs of a step, optimizer steps in all
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}},
              "fp16": {"fp16": {"enabled": True, "initial_scale_power": 9}}}  # fmt: skip
Layout = tuple[int, str]  # ZeRO stage, precision


class Setting:
    """The data, and what is built, saved and loaded in each layout."""

    def __init__(self, source: str, device, **student):
        self.device = device
        optim = {"warmup_share": 0.0, "micro_batch": BATCH, "ema_decay": 0.9}
        self.config = make.config(data={"source": source}, optim=optim, student=student)
        self.data = make.data_of(self.config)
        self.batches = make.batches(self.data, BATCH, 4)

    def build(self, layout: Layout, **more):
        """The engine of a layout, its JSON, the sampler, and the count of bad samples."""
        stage, precision = layout
        settings = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision], **more}
        ds_config = DeepSpeedConfig.of(settings).filled(self.config.optim, 1, STEPS)
        train_engine = engine.build(self.config, ds_config, self.data.vocab_size, STEPS, self.device)
        count = len(self.data.train)
        return train_engine, ds_config, GlobalBatchSampler(count, BATCH, 0, 1, 0), BadSamples(1.0, count, [])

    def write(self, folder: Path, layout: Layout, **more) -> dict:
        """Two steps and a checkpoint of them; what it holds, and the losses of the next two steps."""
        train_engine, ds_config, sampler, bad = self.build(layout, **more)
        for batch in self.batches[:2]:
            train_engine.step([batch])
        state = resume.state_of(None, self.config, ds_config, False)
        state.step = 2
        state.capture(sampler, bad)
        checkpoints = Checkpoints(folder, train_engine, self.config.run, (0, False))
        checkpoints.save(state)
        assert checkpoints.error is None
        return {} if more else {**whole(train_engine), "losses": self.losses(train_engine)}

    def read(self, folder: Path, layout: Layout) -> dict:
        """The same of an engine that has loaded it."""
        train_engine, ds_config, sampler, bad = self.build(layout)
        result = resume.find("auto", folder)
        assert result is not None
        state = resume.state_of(result, self.config, ds_config, True)
        sampler.load_state_dict(state.sampler)
        resume.load(result, state, train_engine, bad)
        assert not (result.path.parent / "universal.writing").exists()
        own = whole(train_engine)
        for name, parameter in train_engine.objective.named_parameters():
            if not hasattr(parameter, "ds_id"):  # what the next forward pass uses
                assert torch.equal(parameter.detach().float(), own["weights"][name].to(parameter.dtype).float())
        return {**own, "losses": self.losses(train_engine)}

    def losses(self, train_engine) -> list[float]:
        return [train_engine.step([batch])[0].total.item() for batch in self.batches[2:]]


def whole(train_engine) -> dict:
    """Everything that an update depends on, whole, whatever the layout. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = train_engine.engine
    weights = {n: x.clone() for n, x in full_weights(train_engine).items()}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 do so in their next step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    moments = {}
    for name, parameter in train_engine.objective.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone().flatten()
    groups = [{k: g[k] for k in ("lr", "initial_lr", "betas", "eps", "weight_decay")}
              for g in engine.optimizer.param_groups]  # fmt: skip
    steps = {float(state["step"]) for state in engine.optimizer.state.values()}
    counters = [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.lr_scheduler.last_epoch]
    averages = full_averages(train_engine)
    assert averages is not None
    averages = {name: average.clone() for name, average in averages.items()}
    scale = {name: vars(engine.optimizer.loss_scaler).get(name) for name in ("cur_scale", "cur_iter")}
    shared = repr((groups, steps, counters))
    return {"weights": weights, "averages": averages, "moments": moments, "shared": shared, "scale": scale}


@pytest.fixture(scope="module")
def setting(source, device) -> Setting:
    return Setting(source[1], device)


@pytest.fixture(scope="module")
def written(setting, tmp_path_factory):
    """The folder of a run of a layout, written once, and what it holds."""

    def write(layout):
        folder = tmp_path_factory.mktemp("written")
        return folder, setting.write(folder, layout)

    return functools.cache(write)


# Each stage as the one before and as the one after; and each precision before and after another.
SLOW = [
    *(((2, before), (2, after)) for before, after in pairwise((*PRECISIONS, "fp32"))),
    ((3, "bf16"), (1, "bf16")),
    ((1, "fp16"), (3, "fp32")),
    ((3, "fp32"), (1, "fp16")),
    ((2, "fp16"), (1, "fp16")),
]
CHANGES = [((1, "bf16"), (2, "bf16")), ((2, "bf16"), (3, "bf16"))]
CHANGES += [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW]


@pytest.mark.parametrize("before, after", CHANGES, ids=str)
def test_each_stage_and_precision_goes_on_at_another(setting, written, before, after, fp16_device):
    """Weights and moments to the bit, and losses of about 6.5 within a limit.

    Another precision rounds the cosines otherwise, by up to 2^-8, and CMLI's logits are 50 times these: 0.2 a logit. So
    does ZeRO-3's own linear layer on a processor without instructions for bf16.
    """
    folder, record = written(before)
    own = setting.read(folder, after)
    assert own["shared"] == record["shared"]
    assert before[1] != after[1] or own["scale"] == record["scale"]
    for kind in ("weights", "averages", "moments"):
        assert own[kind].keys() == record[kind].keys()
        assert all(torch.equal(own[kind][name], value) for name, value in record[kind].items()), kind
    limit = 0.5
    if before[1] == after[1] == "bf16":
        limit = 0.03 if bf16_is_fast() else 0.3
    assert own["losses"] == pytest.approx(record["losses"], rel=0, abs=limit)


def test_what_cannot_be_converted_or_does_not_fit_is_one_line(setting, written, tmp_path):
    optimizer = {"type": "SGD", "params": {"lr": 0.01}}
    setting.write(tmp_path, (1, "fp32"), optimizer=optimizer, zero_allow_untested_optimizer=True)
    with pytest.raises(UserError, match=r"step2: cannot be converted to other ranks, ZeRO stage or precision: "):
        setting.read(tmp_path, (2, "fp32"))
    narrow = Setting(setting.config.data.source, setting.device, embed_dim=24)
    for stage in (1, 2):  # converted, and as it is
        with pytest.raises(UserError, match="step2: does not fit the model and the optimizer of this start: ") as error:
            narrow.read(written((2, "fp32"))[0], (stage, "fp32"))
        assert "\n" not in str(error.value)
