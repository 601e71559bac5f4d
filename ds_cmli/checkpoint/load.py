"""Loads a checkpoint into the engine: as it is, or on other ranks (`checkpoint/universal.py`)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_cmli.checkpoint.state import TrainState, read_state
from ds_cmli.checkpoint.storage import CHECKSUMS, CheckpointWriter
from ds_cmli.checkpoint.universal import load_resharded
from ds_cmli.checkpoint.weights import load_averages, load_frozen
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import blame
from ds_cmli.files import JsonObject, Section, read_json
from ds_cmli.models.hf import AVERAGE
from ds_cmli.pretrained import loading

# The sections of the DeepSpeed JSON that decide the form of DeepSpeed's files.
LAYOUT_SECTIONS = re.compile(r"zero_|fp16|bf16|data_types|torch_auto")
# The position in a schedule, by the names of its state; the other names are settings.
SCHEDULE_POSITION = ("last_epoch", "_step_count", "_last_lr", "last_batch_iteration", "lr_lambdas")
# All that PyTorch's loader builds from a file besides tensors and plain values.
torch.serialization.add_safe_globals(
    [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
)


def load_checkpoint(
    checkpoint: Path, settings: JsonObject, train_engine: TrainEngine, changed: bool
) -> None:
    """Load a verified checkpoint into the engine. Collective.

    Args:
        settings: the settings of this start, as `settings_to_keep` returns them.
        changed: whether the optimizer and the schedule keep the settings of this start.

    Raises `UserError` if the checkpoint does not fit the engine.
    """
    engine = train_engine.engine
    engine.checkpoint_engine = CheckpointWriter()
    with (
        blame(f"{checkpoint}: does not fit the model and the optimizer of this start"),
        _settings_kept(train_engine) if changed else nullcontext(),
    ):
        if is_resharded(read_state(checkpoint), settings):
            load_resharded(checkpoint, train_engine)  # collectives
        else:
            with loading(hub=False):
                # Collectives. Frozen weights are not in its files.
                engine.load_checkpoint(
                    str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False
                )
        for name in read_json(checkpoint / CHECKSUMS):
            if name.startswith("../frozen-"):
                load_frozen(checkpoint / name, train_engine)  # collectives
        load_averages(checkpoint / AVERAGE, train_engine)


def is_resharded(saved_state: TrainState, settings: JsonObject) -> bool:
    """Return True if weights and moments are partitioned otherwise than by these settings."""

    def layout(deepspeed_json: Section) -> JsonObject:
        return {key: x for key, x in deepspeed_json.items() if LAYOUT_SECTIONS.match(key)}

    has_other_layout = layout(saved_state.config["deepspeed"]) != layout(settings["deepspeed"])
    return has_other_layout or saved_state.world_size != distributed.world_size()


@contextmanager
def _settings_kept(train_engine: TrainEngine) -> Iterator[None]:
    """Keep this start's rates, weight decay and schedule, which loading inside overwrites."""
    optimizer = train_engine.engine.optimizer
    scheduler = train_engine.engine.lr_scheduler
    start_groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    state = scheduler.state_dict()
    schedule = {key: value for key, value in state.items() if key not in SCHEDULE_POSITION}
    yield
    vars(scheduler).update(schedule)
    rates = scheduler.get_lr()
    for group, start_group, rate in zip(optimizer.param_groups, start_groups, rates, strict=True):
        group.update(start_group)
        group["lr"] = rate
