"""The optimizer Muon as DeepSpeed has it: which parameters are its matrices, and at what rates.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum of
each hidden matrix. All other parameters are updated by an auxiliary AdamW.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ds_cmli.common.patches import patched, uncompiled_for_good
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.json_values import JsonObject
from ds_cmli.engine.parameter_groups import MuonRates


def rates(ds_config: DeepSpeedConfig) -> MuonRates | None:
    """The factors of the JSON's learning rate; None if the optimizer is another one."""
    if not ds_config.optimizer_entry.orthogonalizes:
        return None
    params = ds_config.optimizer_params
    lr = params["lr"]
    return MuonRates(params.get("muon_lr", lr) / lr, params.get("adam_lr", lr) / lr)


@contextmanager
def tagged(groups: list[JsonObject]) -> Iterator[None]:
    """Inside, DeepSpeed's engine takes the matrices that `groups` name, and runs uncompiled."""
    if not any("use_muon" in group for group in groups):
        yield
        return
    matrices = set()
    for group in groups:
        if group["use_muon"]:
            matrices |= set(map(id, group["params"]))

    def tag(config: object, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.use_muon = id(parameter) in matrices  # type: ignore[attr-defined]

    uncompiled_for_good("deepspeed: compiled updates")
    uncompiled_for_good("deepspeed: compiled updates without ZeRO")
    with patched("deepspeed: matrices for Muon", lambda _: tag):
        yield
