"""Every optimizer and learning rate schedule that a DeepSpeed JSON may name.

An entry says all that the rest of the package asks about an optimizer or a schedule, so a new one
of PyTorch or DeepSpeed is one entry. Nothing here imports either of the two; tests compare the
entries with what both take.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ds_cmli.config.json_values import Kind, integer, number, numbers, one_of, refused


@dataclass(frozen=True)
class Optimizer:
    parameters: tuple[str, ...] = ()  # the keys that its "params" may have
    # Parameters whose values differ from `PARAMETERS`; they are not filled from `OptimConfig`.
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    # Of these parameters some only DeepSpeed's implementation takes, and some only PyTorch's. The
    # parameter torch_adam chooses between the two implementations.
    deepspeeds: tuple[str, ...] = ()
    pytorchs: tuple[str, ...] = ()
    any_case: bool = False  # whether DeepSpeed looks for the name itself, in upper or lower case
    compiled: bool = False  # whether DeepSpeed has only its own, compiled at first use, for GPUs
    zero_tested: bool = False  # whether ZeRO takes it without `zero_allow_untested_optimizer`
    one_group: bool = False  # whether ZeRO gives all parameters the settings of one group
    # Whether it orthogonalizes the updates of matrices, and leaves all else to an auxiliary AdamW.
    orthogonalizes: bool = False
    why_not: str = ""  # why it cannot train here

    required: ClassVar[tuple[str, ...]] = ()  # no optimizer needs a parameter

    @property
    def takes(self) -> tuple[str, ...]:
        return self.parameters

    @property
    def chosen(self) -> bool:
        """Whether "torch_adam" chooses between PyTorch's and DeepSpeed's implementation."""
        return "torch_adam" in self.parameters


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


def _adam(kinds: Mapping[str, Kind]) -> Optimizer:
    return Optimizer(
        (*_ADAM, *_OWN, "amsgrad", "fused", "torch_adam", "adam_w_mode"),
        kinds,
        deepspeeds=_OWN,
        pytorchs=("amsgrad", "capturable", "foreach", "fused", "maximize"),
        any_case=True,
        zero_tested=True,
    )


_NO_MUP = Optimizer(any_case=True, why_not="the models have no muP shapes")
OPTIMIZERS = {
    "Adadelta": Optimizer(("lr", "rho", "eps", "weight_decay", "capturable", *_TORCH)),
    "Adafactor": Optimizer(
        ("lr", "beta2_decay", "eps", "d", "weight_decay", "foreach", "maximize"),
        {"eps": numbers(2, number(0))},
    ),
    "Adagrad": Optimizer(
        ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "fused", *_TORCH),
        any_case=True,
        one_group=True,
    ),
    "Adam": _adam({}),
    "AdamW": _adam({"adam_w_mode": _ADAMW_MODE}),
    "Adamax": Optimizer(_ADAM),
    "ASGD": Optimizer(("lr", "lambd", "alpha", "t0", "weight_decay", "capturable", *_TORCH)),
    "Lamb": Optimizer(
        _names(
            "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff amsgrad"
        ),
        any_case=True,
        compiled=True,
    ),
    "Lion": Optimizer(
        ("lr", "betas", "weight_decay", "set_grad_none", "fp32_optimizer_states"),
        any_case=True,
        compiled=True,
        zero_tested=True,
    ),
    "NAdam": Optimizer((*_ADAM, "momentum_decay", "decoupled_weight_decay")),
    "RAdam": Optimizer((*_ADAM, "decoupled_weight_decay")),
    "RMSprop": Optimizer(
        ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "capturable", *_TORCH)
    ),
    "Rprop": Optimizer(("lr", "etas", "step_sizes", "capturable", *_TORCH)),
    "SGD": Optimizer(("lr", "momentum", "dampening", "weight_decay", "nesterov", "fused", *_TORCH)),
    "LBFGS": Optimizer(any_case=True, why_not="it needs the loss several times a step"),
    "SparseAdam": Optimizer(any_case=True, why_not="no gradient here is sparse"),
    "Muon": Optimizer(
        _names("lr muon_lr adam_lr momentum ns_method betas eps weight_decay foreach torch_adam"),
        {
            "muon_lr": number(0, above=True),
            "adam_lr": number(0, above=True),
            "momentum": number(0, 1),
            "ns_method": one_of("gram", "standard"),
            "torch_adam": one_of(True),
        },
        any_case=True,
        zero_tested=True,
        orthogonalizes=True,
    ),
    "MuAdam": _NO_MUP,
    "MuAdamW": _NO_MUP,
    "MuSGD": _NO_MUP,
}


def optimizer_name(kind: object) -> str:
    """Spell the optimizer's name as in PyTorch's or DeepSpeed's documentation.

    DeepSpeed accepts its own names in any case, and PyTorch's only as they are written.
    """
    for name, entry in OPTIMIZERS.items():
        if entry.any_case and name.lower() == str(kind).lower():
            return name
    return str(kind)


@dataclass(frozen=True)
class Scheduler:
    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()  # further parameters, which must be given
    filled: tuple[str, ...] = ()  # further parameters, which are filled if they are missing
    # The parameter that says after how many steps the schedule ends; nothing is learned after it.
    end: str = ""
    deepspeeds: bool = False  # whether DeepSpeed makes it; the others are PyTorch's
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # as of an optimizer
    why_not: str = ""

    @property
    def takes(self) -> tuple[str, ...]:
        return (*self.required, *self.filled, *self.parameters)


_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
_NO_FUNCTIONS = Scheduler(why_not="JSON has no functions")
_NO_OBJECTS = Scheduler(why_not="JSON has no scheduler objects")
SCHEDULERS = {
    "LRRangeTest": Scheduler(
        _names(
            "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate "
            "lr_range_test_staircase"
        ),
        deepspeeds=True,
    ),
    "OneCycle": Scheduler(
        _names(
            "decay_lr_rate cycle_first_step_size cycle_second_step_size "
            "cycle_first_stair_count cycle_second_stair_count decay_step_size "
            "cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate"
        ),
        required=("cycle_min_lr", "cycle_max_lr"),
        deepspeeds=True,
    ),
    "WarmupLR": Scheduler(("warmup_type",), filled=_WARMUP, deepspeeds=True),
    "WarmupDecayLR": Scheduler(
        ("warmup_type",),
        filled=("total_num_steps", *_WARMUP),
        end="total_num_steps",
        deepspeeds=True,
    ),
    "WarmupCosineLR": Scheduler(
        ("warmup_min_ratio", "cos_min_ratio", "warmup_type"),
        filled=("total_num_steps", "warmup_num_steps"),
        end="total_num_steps",
        deepspeeds=True,
    ),
    "ConstantLR": Scheduler(("factor", "total_iters")),
    "CosineAnnealingLR": Scheduler(("eta_min",), required=("T_max",)),
    "CosineAnnealingWarmRestarts": Scheduler(("T_mult", "eta_min"), required=("T_0",)),
    "CyclicLR": Scheduler(
        _names(
            "step_size_up step_size_down mode gamma scale_mode cycle_momentum base_momentum "
            "max_momentum"
        ),
        required=("base_lr", "max_lr"),
    ),
    "ExponentialLR": Scheduler(required=("gamma",)),
    "LinearLR": Scheduler(("start_factor", "end_factor", "total_iters")),
    "MultiStepLR": Scheduler(("gamma",), required=("milestones",)),
    "OneCycleLR": Scheduler(
        _names(
            "total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum "
            "base_momentum max_momentum div_factor final_div_factor three_phase"
        ),
        required=("max_lr",),
        end="total_steps",
    ),
    "PolynomialLR": Scheduler(("power",), filled=("total_iters",), end="total_iters"),
    "StepLR": Scheduler(("gamma",), required=("step_size",)),
    "LambdaLR": _NO_FUNCTIONS,
    "MultiplicativeLR": _NO_FUNCTIONS,
    "SequentialLR": _NO_OBJECTS,
    "ChainedScheduler": _NO_OBJECTS,
    "ReduceLROnPlateau": Scheduler(why_not="there is no validation loss at each step"),
}

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
