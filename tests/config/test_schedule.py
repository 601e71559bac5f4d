import pytest

from tests import make
from tests.conftest import ZERO1

CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}
UNTESTED = {"zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
CONTENTS = {
    **{kind: {"optimizer": {"type": kind}, **UNTESTED} for kind in ("adamw", "RAdam")},
    "WarmupCosineLR": {"scheduler": {"type": "WarmupCosineLR", "params": {}}},
    "OneCycle": {"scheduler": {"type": "OneCycle", "params": CYCLE}, "zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_each_step_trains_at_the_rate_that_is_logged_for_it(kind, device, data):
    trained = make.train_engine(device, ZERO1 | CONTENTS[kind], 4, optim={"lr": 1e-2, "warmup_share": 0.5})
    weight = trained.objective.student.projection.weight
    logged = []
    changes = []
    next_rates = []
    for batch in make.batches(data, 8, 4):
        weight_before = weight.detach().clone()
        trained.step([batch])
        logged.append(trained.log_columns()["lr"])
        changes.append((weight - weight_before).abs().max().item())
        next_rates.append(trained.engine.get_lr()[0])
    assert logged[1:] == next_rates[:-1]
    assert [rate > 0 for rate in logged] == [change > 0 for change in changes]
    if "scheduler" not in CONTENTS[kind]:
        assert logged == pytest.approx([0.005, 0.01, 0.0075, 0.0025])
    if kind == "adamw":
        assert changes[0] == pytest.approx(logged[0], rel=0.3)  # whose first update is the rate
