"""Every optimizer and learning rate schedule that a DeepSpeed JSON may name.

An entry says what the signatures in PyTorch and DeepSpeed do not, so a new one of theirs is one
entry. Both are imported only when parameters are needed.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from ds_cmli.config.validation import PydanticType, integer, number, numbers, one_of, refused


@dataclass(frozen=True)
class OptimizerEntry:
    name: str
    parameters: tuple[str, ...] = ()  # the keys that its "params" may have; (): as PyTorch's takes
    # Parameters whose values differ from `PARAMETERS`; they are not filled from `OptimConfig`.
    kinds: Mapping[str, PydanticType] = field(default_factory=dict)
    # Of these parameters some only DeepSpeed's implementation takes, and some only PyTorch's. The
    # parameter torch_adam chooses between the two implementations.
    deepspeeds: tuple[str, ...] = ()
    pytorchs: tuple[str, ...] = ()
    any_case: bool = False  # whether DeepSpeed looks for the name itself, in upper or lower case
    compiled: bool = False  # whether DeepSpeed has only its own, compiled at first use, for GPUs
    zero_tested: bool = False  # whether ZeRO takes it without `zero_allow_untested_optimizer`
    why_not: str = ""  # why it cannot train here

    required: ClassVar[tuple[str, ...]] = ()  # no optimizer needs a parameter

    @property
    def takes(self) -> tuple[str, ...]:
        if self.parameters or self.why_not:
            return self.parameters
        from torch import optim

        return tuple(_signature(getattr(optim, self.name)))

    @property
    def chosen(self) -> bool:
        """Whether "torch_adam" chooses between PyTorch's and DeepSpeed's implementation."""
        return "torch_adam" in self.parameters


# What is no setting of an optimizer or a schedule: objects, and the position in the schedule.
_OBJECTS = {"params", "optimizer", "scale_fn", "last_epoch", "last_batch_iteration"}


def _signature(kind: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class that a JSON may give, by name."""
    out = dict(inspect.signature(kind).parameters)
    for name in _OBJECTS:
        out.pop(name, None)
    return out


TableEntry = TypeVar("TableEntry", OptimizerEntry, "SchedulerEntry")


def _named(entries: Iterable[TableEntry]) -> dict[str, TableEntry]:
    return {entry.name: entry for entry in entries}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TORCH = ("foreach", "maximize", "differentiable")
_ADAM = ("lr", "betas", "eps", "weight_decay", "capturable", *_TORCH)
_OWN = ("bias_correction", "set_grad_none", "fp32_optimizer_states")


_ADAMW_MODE = refused(
    "AdamW decays the weights whatever it says: remove it, or give the type Adam, which then adds "
    "the decay to the gradients",
    True,
)


def _adam(name: str, kinds: Mapping[str, PydanticType]) -> OptimizerEntry:
    return OptimizerEntry(
        name,
        (*_ADAM, *_OWN, "amsgrad", "fused", "torch_adam", "adam_w_mode"),
        kinds,
        deepspeeds=_OWN,
        pytorchs=("amsgrad", "capturable", "foreach", "fused", "maximize"),
        any_case=True,
        zero_tested=True,
    )


_NO_MUP = "the models have no muP shapes"
OPTIMIZERS = _named(
    [
        *map(OptimizerEntry, _names("Adadelta Adamax ASGD NAdam RAdam RMSprop Rprop SGD")),
        OptimizerEntry("Adafactor", kinds={"eps": numbers(2, number(0))}),
        OptimizerEntry("Adagrad", any_case=True, why_not="ZeRO makes one group of all parameters"),
        _adam("Adam", {}),
        _adam("AdamW", {"adam_w_mode": _ADAMW_MODE}),
        OptimizerEntry(
            "Lamb",
            _names(
                "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff "
                "amsgrad"
            ),
            any_case=True,
            compiled=True,
        ),
        OptimizerEntry(
            "Lion",
            _names("lr betas weight_decay set_grad_none fp32_optimizer_states"),
            any_case=True,
            compiled=True,
            zero_tested=True,
        ),
        OptimizerEntry("LBFGS", any_case=True, why_not="it needs the loss several times a step"),
        OptimizerEntry("SparseAdam", any_case=True, why_not="no gradient here is sparse"),
        OptimizerEntry("MuAdam", any_case=True, why_not=_NO_MUP),
        OptimizerEntry("MuAdamW", any_case=True, why_not=_NO_MUP),
        OptimizerEntry("MuSGD", any_case=True, why_not=_NO_MUP),
    ]
)


def optimizer_name(kind: object) -> str:
    """Spell the optimizer's name as in PyTorch's or DeepSpeed's documentation.

    DeepSpeed accepts its own names in any case, and PyTorch's only as they are written.
    """
    for name, entry in OPTIMIZERS.items():
        if entry.any_case and name.lower() == str(kind).lower():
            return name
    return str(kind)


@dataclass(frozen=True)
class SchedulerEntry:
    name: str
    filled: tuple[str, ...] = ()  # parameters that are filled if they are missing
    # The parameter that says after how many steps the schedule ends; nothing is learned after it.
    end: str = ""
    kinds: Mapping[str, PydanticType] = field(default_factory=dict)  # as of an optimizer
    why_not: str = ""

    @property
    def deepspeeds(self) -> bool:
        """Whether DeepSpeed makes it; the others are PyTorch's."""
        from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

        return self.name in VALID_LR_SCHEDULES

    def _parameters(self) -> dict[str, inspect.Parameter]:
        if self.why_not:
            return {}
        from deepspeed.runtime import lr_schedules
        from torch.optim import lr_scheduler

        return _signature(getattr(lr_schedules if self.deepspeeds else lr_scheduler, self.name))

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(self._parameters())

    @property
    def required(self) -> list[str]:
        """Parameters that must be given."""
        out = []
        for name, parameter in self._parameters().items():
            if parameter.default is parameter.empty and name not in self.filled:
                out.append(name)
        return out


_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
_NO_FUNCTIONS, _NO_OBJECTS = "JSON has no functions", "JSON has no scheduler objects"
SCHEDULERS = _named(
    [
        *map(
            SchedulerEntry,
            _names("LRRangeTest OneCycle CyclicLR ConstantLR LinearLR ExponentialLR"),
        ),
        *map(
            SchedulerEntry,
            _names("StepLR MultiStepLR CosineAnnealingLR CosineAnnealingWarmRestarts"),
        ),
        SchedulerEntry("WarmupLR", _WARMUP),
        SchedulerEntry("WarmupDecayLR", ("total_num_steps", *_WARMUP), "total_num_steps"),
        SchedulerEntry(
            "WarmupCosineLR", ("total_num_steps", "warmup_num_steps"), "total_num_steps"
        ),
        SchedulerEntry("OneCycleLR", end="total_steps"),
        SchedulerEntry("PolynomialLR", ("total_iters",), "total_iters"),
        SchedulerEntry("LambdaLR", why_not=_NO_FUNCTIONS),
        SchedulerEntry("MultiplicativeLR", why_not=_NO_FUNCTIONS),
        SchedulerEntry("SequentialLR", why_not=_NO_OBJECTS),
        SchedulerEntry("ChainedScheduler", why_not=_NO_OBJECTS),
        SchedulerEntry("ReduceLROnPlateau", why_not="there is no validation loss at each step"),
    ]
)

_positive, _not_negative = number(0, above=True), number(0)
_rates = _not_negative | numbers(None, _not_negative)
_BY_KIND = {
    "lr": _positive,
    "betas": numbers(2, number(0, 1)),
    "etas step_sizes": numbers(2, _positive),
    "eps weight_decay momentum lr_decay initial_accumulator_value": _not_negative,
    "amsgrad maximize capturable torch_adam adam_w_mode bias_correction set_grad_none": bool,
    "fp32_optimizer_states eps_inside_sqrt decoupled_weight_decay centered nesterov": bool,
    "three_phase cycle_momentum lr_range_test_staircase": bool,
    "differentiable": one_of(False),
    "foreach fused": bool | None,
    "cycle_first_stair_count cycle_second_stair_count decay_step_size": integer() | None,
    "lr_range_test_step_size cycle_first_step_size warmup_num_steps total_num_steps": integer(1),
    "total_iters T_max T_0 T_mult step_size_up step_size epochs steps_per_epoch": integer(1),
    "total_steps": integer(1),
    "cycle_second_step_size step_size_down": integer(1) | None,
    "milestones": numbers(None, integer(1)),
    "warmup_type": one_of("log", "linear"),
    "mode": one_of("triangular", "triangular2", "exp_range"),
    "scale_mode": one_of("cycle", "iterations"),
    "anneal_strategy": one_of("cos", "linear"),
    "pct_start": number(0, 1),
    "warmup_min_lr warmup_max_lr cycle_min_lr cycle_max_lr": _rates,
    "lr_range_test_min_lr base_lr max_lr": _rates,
    "warmup_min_ratio cos_min_ratio eta_min factor start_factor end_factor": _not_negative,
}
# The kinds of the parameters of optimizers and schedulers by name; any other parameter is a number.
PARAMETERS = {name: kind for names, kind in _BY_KIND.items() for name in names.split()}
PARAMETER = number()
