"""Every optimizer and learning rate schedule that a DeepSpeed JSON may name, with the parameters that each takes."""

from ds_cmli.config.json_values import (
    Kind,
    boolean,
    either,
    integer,
    number,
    numbers,
    one_of,
    optional,
)

_TORCH = "foreach maximize differentiable"
_ADAM = f"lr betas eps weight_decay capturable {_TORCH}"
OPTIMIZERS = {
    "Adadelta": f"lr rho eps weight_decay capturable {_TORCH}",
    "Adafactor": "lr beta2_decay eps d weight_decay foreach maximize",
    "Adagrad": f"lr lr_decay weight_decay initial_accumulator_value eps fused {_TORCH}",
    "Adam": f"{_ADAM} amsgrad fused torch_adam adam_w_mode bias_correction set_grad_none fp32_optimizer_states",
    "AdamW": f"{_ADAM} amsgrad fused torch_adam adam_w_mode bias_correction set_grad_none fp32_optimizer_states",
    "Adamax": _ADAM,
    "ASGD": f"lr lambd alpha t0 weight_decay capturable {_TORCH}",
    "Lamb": "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff amsgrad",
    "Lion": "lr betas weight_decay set_grad_none fp32_optimizer_states",
    "NAdam": f"{_ADAM} momentum_decay decoupled_weight_decay",
    "RAdam": f"{_ADAM} decoupled_weight_decay",
    "RMSprop": f"lr alpha eps weight_decay momentum centered capturable {_TORCH}",
    "Rprop": f"lr etas step_sizes capturable {_TORCH}",
    "SGD": f"lr momentum dampening weight_decay nesterov fused {_TORCH}",
}
ZERO_TESTED = ("Adam", "AdamW", "Lion")
OURS_ALONE = {
    "bias_correction",
    "set_grad_none",
    "fp32_optimizer_states",
}  # only DeepSpeed's Adam has these
PYTORCHS_ALONE = {"amsgrad", "capturable", "foreach", "fused", "maximize"}  # and these PyTorch's
NO_OPTIMIZERS = {
    "LBFGS": "it needs the loss several times a step",
    "SparseAdam": "no gradient here is sparse",
    "Muon": "it takes matrices alone, and these models have other parameters",
    **dict.fromkeys(("MuAdam", "MuAdamW", "MuSGD"), "the models have no muP shapes"),
}
# Names by their lower-case form: DeepSpeed accepts its own names in any case, and PyTorch's only as they are written.
DEEPSPEED_OPTIMIZERS = {
    n.lower(): n for n in ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", *NO_OPTIMIZERS)
}

# Parameters of each scheduler: "!" marks a required one, "+" one that is filled if it is missing.
SCHEDULERS = {
    "LRRangeTest": "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase",
    "OneCycle": "cycle_min_lr! cycle_max_lr! decay_lr_rate cycle_first_step_size cycle_second_step_size "
    "cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom "
    "decay_mom_rate",
    "WarmupLR": "warmup_min_lr+ warmup_max_lr+ warmup_num_steps+ warmup_type",
    "WarmupDecayLR": "total_num_steps+ warmup_min_lr+ warmup_max_lr+ warmup_num_steps+ warmup_type",
    "WarmupCosineLR": "total_num_steps+ warmup_min_ratio warmup_num_steps+ cos_min_ratio warmup_type",
    "ConstantLR": "factor total_iters",
    "CosineAnnealingLR": "T_max! eta_min",
    "CosineAnnealingWarmRestarts": "T_0! T_mult eta_min",
    "CyclicLR": "base_lr! max_lr! step_size_up step_size_down mode gamma scale_mode cycle_momentum base_momentum "
    "max_momentum",
    "ExponentialLR": "gamma!",
    "LinearLR": "start_factor end_factor total_iters",
    "MultiStepLR": "milestones! gamma",
    "OneCycleLR": "max_lr! total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum base_momentum "
    "max_momentum div_factor final_div_factor three_phase",
    "PolynomialLR": "total_iters+ power",
    "StepLR": "step_size! gamma",
}
# The parameter that says after how many steps a scheduler has come to its end, where nothing is learned any more.
ENDS = {
    **dict.fromkeys(("WarmupDecayLR", "WarmupCosineLR"), "total_num_steps"),
    **{"PolynomialLR": "total_iters", "OneCycleLR": "total_steps"},
}
DEEPSPEED_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
NO_SCHEDULERS = {
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "JSON has no functions"),
    **dict.fromkeys(("SequentialLR", "ChainedScheduler"), "JSON has no scheduler objects"),
    "ReduceLROnPlateau": "there is no validation loss at each step",
}

_share = number(0, 1)
_rates = either(number(0), numbers(None, number(0)))
_flags = (
    *(
        "amsgrad",
        "maximize",
        "capturable",
        "torch_adam",
        "adam_w_mode",
        "bias_correction",
        "set_grad_none",
    ),
    *(
        "fp32_optimizer_states",
        "eps_inside_sqrt",
        "decoupled_weight_decay",
        "centered",
        "nesterov",
        "three_phase",
    ),
    *("cycle_momentum", "lr_range_test_staircase"),
)
_counts = ("cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size")
_lengths = (
    *(
        "lr_range_test_step_size",
        "cycle_first_step_size",
        "warmup_num_steps",
        "total_num_steps",
        "total_iters",
        "T_max",
    ),
    *("T_0", "T_mult", "step_size_up", "step_size", "epochs", "steps_per_epoch", "total_steps"),
)
# The kinds of the parameters of optimizers and schedulers by name; any other parameter is a number.
PARAMETERS: dict[str, Kind] = {
    "lr": number(0, above=True),
    "betas": numbers(2, _share),
    "etas": numbers(2, number(0, above=True)),
    "step_sizes": numbers(2, number(0, above=True)),
    **dict.fromkeys(
        ("eps", "weight_decay", "momentum", "lr_decay", "initial_accumulator_value"), number(0)
    ),
    **dict.fromkeys(_flags, boolean),
    "differentiable": one_of(False),
    **dict.fromkeys(("foreach", "fused"), optional(boolean)),
    **dict.fromkeys(_counts, optional(integer())),
    **dict.fromkeys(_lengths, integer(1)),
    **dict.fromkeys(("cycle_second_step_size", "step_size_down"), optional(integer(1))),
    "milestones": numbers(None, integer(1)),
    "warmup_type": one_of("log", "linear"),
    "mode": one_of("triangular", "triangular2", "exp_range"),
    "scale_mode": one_of("cycle", "iterations"),
    "anneal_strategy": one_of("cos", "linear"),
    "pct_start": number(0, 1),
    **dict.fromkeys(
        (
            "warmup_min_lr",
            "warmup_max_lr",
            "cycle_min_lr",
            "cycle_max_lr",
            "lr_range_test_min_lr",
            "base_lr",
            "max_lr",
        ),
        _rates,
    ),
    **dict.fromkeys(
        ("warmup_min_ratio", "cos_min_ratio", "eta_min", "factor", "start_factor", "end_factor"),
        number(0),
    ),
}
PARAMETER = number()
