"""Changes of a DeepSpeed JSON: whether DeepSpeed and a small model notice them, or a line tells them."""

import contextlib
import copy
import io
import json
import logging
import random
import re
from functools import lru_cache
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig as Theirs

from ds_cmli.common.errors import UserError
from ds_cmli.config import optimizers, schedule
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import OptimConfig
from ds_cmli.engine.building import use_no_compiler
from tests.config.soak import Counts

STEPS = 12
PARAMS = {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
PLAIN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 0},
    "optimizer": {"type": "AdamW", "params": PARAMS},
}
SCHEDULERS = {
    "WarmupDecayLR": {"total_num_steps": 99, "warmup_num_steps": 2}, "WarmupCosineLR": {"total_num_steps": 99},
    "WarmupLR": {"warmup_num_steps": 2}, "PolynomialLR": {"total_iters": 99}, "StepLR": {"step_size": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 99}, "CosineAnnealingLR": {"T_max": 99}, "LinearLR": {},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1}, "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1},
    "ExponentialLR": {"gamma": 0.9}, "MultiStepLR": {"milestones": [3]}, "ConstantLR": {},
}  # fmt: skip
MORE = {
    "adam_w_mode": [False], "amsgrad": [True], "betas": [[0.5, 0.9]], "maximize": [True], "lr": [0.2],
    "fp32_optimizer_states": [True], "weight_decay": [0.0], "total_num_steps": [5, 13],
    "warmup_num_steps": [1, 5, 500], "total_iters": [1, 6, 40], "T_max": [3, 40], "gamma": [0, 0.5, 1],
    "step_size": [1, 50], "milestones": [[2, 4], [70]], "total_steps": [6, 40], "scale_mode": ["iterations"],
    "base_momentum": [0.5], "cycle_momentum": [False], "decay_lr_rate": [0.1], "factor": [0, 1, 0.5],
    "end_factor": [0, 0.5], "max_lr": [0.2], "cycle_min_mom": [0.7], "warmup_max_lr": [0, 0.2],
}  # fmt: skip
OTHERS: list[tuple[str, Any]] = [
    ("fp16", {"enabled": False, "loss_scale": 8}),
    ("bf16", {"enabled": False, "immediate_grad_update": True}),
    ("comms_logger", {"enabled": False, "verbose": True}),
    ("flops_profiler", {"enabled": False, "profile_step": 3}),
    ("tensorboard", {"enabled": False, "job_name": "x"}),
    ("gradient_clipping", 0.01),
]


def json_cases(count: int, seed: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what was done, the JSON before, the JSON after)."""
    out = []
    for number in range(count):
        draw = random.Random(f"json {seed} {number}")
        before: dict[str, Any] = copy.deepcopy(PLAIN)
        if draw.random() < 0.7:
            kind = draw.choice([*SCHEDULERS])
            before["scheduler"] = {"type": kind, "params": dict(SCHEDULERS[kind])}
        after = copy.deepcopy(before)
        way = draw.choice(["key", "parameter", "parameter", "parameter", "section"])
        if way == "key":
            places = ["zero_optimization.offload_optimizer", "timers.throughput", "", " ", "fp16.enabled", "FP16",
                      "bf16 ", "zero_optimization.stage", "optimizer.params", "optimizer.params.lr"]  # fmt: skip
            name = draw.choice(places)
            inside = draw.choice([after, after["zero_optimization"], after["optimizer"]])
            inside[name] = draw.choice([{}, {"enabled": True}, {"device": "cpu"}, 1, True])
            by_name = f"key {name!r} = {inside[name]}"
        elif way == "section":
            name, value = draw.choice(OTHERS)
            after[name] = value
            by_name = f"{name} = {value}"
        else:
            section = draw.choice([s for s in ("optimizer", "scheduler") if s in after])
            table = optimizers.OPTIMIZERS if section == "optimizer" else optimizers.SCHEDULERS
            known = table[after[section]["type"]].takes
            fitting = [n for n in known if n in MORE]
            name = draw.choice(fitting or known)
            value = draw.choice(MORE.get(name, [0.5]))
            after[section]["params"][name] = value
            by_name = f"{after[section]['type']}: {name} = {value}"
        out.append((by_name, before, after))
    return out


def trained(content: dict[str, Any]) -> tuple[Any, ...]:
    return _trained(json.dumps(content))


@lru_cache
def _trained(text: str) -> tuple[Any, ...]:
    """What DeepSpeed makes of it: weights and rates of each step of a small model, and the sections that it reads."""
    content = json.loads(text)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    config = DeepSpeedConfig.of(content)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(content),
        lr_scheduler=schedule.maker(config, 1, STEPS),
    )  # fmt: skip
    rates = []
    for step in range(STEPS):
        rates.append(engine.get_lr()[0])
        engine.backward(engine(torch.full((4, 3), 1.0 + step)).square().mean())
        engine.step()
    read = Theirs(copy.deepcopy(content))
    hidden = ("_param_dict", "optimizer_params", "scheduler_params")
    ours = {name: re.sub("0x[0-9a-f]+", "", repr(v)) for name, v in vars(read).items() if name not in hidden}
    return [p.tolist() for p in model.parameters()], rates, ours


def json_way(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """How a change of the key `name` ends."""

    def taken(content: dict[str, Any]) -> tuple[Any, set[str]]:
        config = DeepSpeedConfig.of(content).on("cpu", False, True).filled(OptimConfig(), 1, STEPS)
        line = schedule.try_out(config, torch.device("cpu"), STEPS)
        return config, {*config.notices, *([line] if line else [])}

    try:
        (plain, said), (changed, says) = taken(before), taken(after)
    except UserError as error:
        return "traceback" if "\n" in str(error) else "refused"
    except Exception:
        return "traceback"
    if says - said or any(re.search(rf"\b{re.escape(name)}\b", line) for line in says):
        return "told"
    try:
        weights, rates, read = trained(changed.raw())
    except Exception:
        return "traceback"
    if not any(rates[STEPS // 2 :]):
        return "silent"  # half of the run changes nothing
    return "silent" if (weights, rates, read) == trained(plain.raw()) else "effective"


def soak_json(count: int, seed: int) -> Counts:
    result = Counts("DeepSpeed JSON")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    use_no_compiler()
    for part, before, after in json_cases(count, seed):
        if before == after:
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            name = part.rpartition(": ")[2].partition(" = ")[0]
            way = json_way(name, before, after)
        result.add(part, way)
    return result
