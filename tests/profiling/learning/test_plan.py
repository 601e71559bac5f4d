"""What a plan says, and one line for each mistake in it."""

import pytest

from ds_cmli.common.errors import UserError
from profiling.learning.plan import load
from tests.conftest import ROOT, run

PLAN = """\
preset = "tiny"
seeds = [0, 1]
tuning_seeds = [10]
endpoints = ["eval/seen/combined/mean_recall"]

[settings]
optim = { steps = 3, lr = 1e-3 }

[arms.exact]

[arms.cut]
seeds = [1, 2]
optim.lr = 2e-3
loss.cmli_cut = 0.01

[[contrasts]]
arm = "cut"
against = "exact"
planned = true
equivalence = 0.01
"""


@pytest.fixture
def written(tmp_path):
    def write(old: str = "", new: str = ""):
        assert old in PLAN
        file = tmp_path / "plan.toml"
        file.write_text(PLAN.replace(old, new) if old else PLAN + new)
        return file

    return write


def test_the_runs_of_a_plan(written):
    plan = load(written())
    assert [run.name for run in plan.runs()] == ["exact-0", "exact-1", "cut-1", "cut-2"]
    assert [run.name for run in load(written(), tuning=True).runs()] == ["exact-10", "cut-10"]
    # An arm's settings come over those of all arms, one by one.
    assert plan.runs()[2].settings == {"optim.steps": 3, "optim.lr": 2e-3, "loss.cmli_cut": 0.01}
    assert plan.runs()[0].described() == "tiny optim.lr=0.001 optim.steps=3"
    assert [str(contrast) for contrast in plan.contrasts] == ["cut - exact"]


def test_a_grid_is_tried_on_the_tuning_seeds_alone(written):
    grid = 'tuning_seeds = [10, 11]\ngrid = { "optim.lr" = [1e-3, 4e-3] }'
    own = '[arms.cut]\ngrid = { "loss.cmli_cut" = [0.1, 0.2] }'
    file = written("tuning_seeds = [10]", grid)
    file.write_text(file.read_text().replace("[arms.cut]", own))
    assert [run.name for run in load(file).runs()] == ["exact-0", "exact-1", "cut-1", "cut-2"]
    plan = load(file, tuning=True)
    assert list(plan.arms) == ["exact.0", "exact.1", "cut.0", "cut.1", "cut.2", "cut.3"]
    assert [run.seed for run in plan.runs()] == [10] * 6 + [11] * 6 and plan.contrasts == []
    points = [(run.settings["optim.lr"], run.settings["loss.cmli_cut"]) for run in plan.runs()[2:6]]
    assert points == [(1e-3, 0.1), (1e-3, 0.2), (4e-3, 0.1), (4e-3, 0.2)]
    assert load(file).runs()[2].settings == {"optim.steps": 3, "optim.lr": 2e-3, "loss.cmli_cut": 0.01}


def test_the_json_of_an_arm_lies_beside_the_plan(written, tmp_path):
    file = written("[arms.cut]", '[arms.cut]\ndeepspeed_config = "halves.json"')
    with pytest.raises(UserError, match=r"arms.cut.deepspeed_config is 'halves.json': give a file"):
        load(file)
    (tmp_path / "halves.json").write_text("{}")
    run = load(file).runs()[2]
    assert run.arguments(tmp_path)[-2:] == ["--deepspeed_config", str(tmp_path / "halves.json")]
    assert run.described().endswith(" halves.json:44136fa3") and "halves" not in load(file).runs()[0].described()


def test_what_the_endpoints_of_scenes_need(written):
    assert load(written("eval/seen/combined/mean_recall", "unseen/mean_recall")).endpoints == ["unseen/mean_recall"]
    file = written("eval/seen/combined/mean_recall", "swap/captions")
    file.write_text(file.read_text().replace("[arms.cut]", '[arms.cut]\ndata.source = "pairs"'))
    with pytest.raises(UserError, match="endpoints is 'swap/captions': it needs the demo's scenes"):
        load(file)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("cmli_cut =", "cmli_cutt =", "arm cut: setting of loss is 'cmli_cutt': did you mean 'cmli_cut'?"),
        ("cmli_cut = 0.01", "cmli_cut = 2.0", "arm cut: loss.cmli_cut is 2.0"),
        ("loss.cmli_cut = 0.01", "loss = 0.01", "arms.cut.loss is 0.01: write settings as"),
        ("loss.cmli_cut = 0.01", "run.seed = 3", "arms.cut.run.seed is 3: leave it out: seeds gives it"),
        ("[arms.cut]", "[arms.exact]", "Cannot declare ('arms', 'exact') twice"),
        ("[arms.cut]", '[arms."a cut"]', "arms is 'a cut': a name becomes a folder's"),
        ("seeds = [0, 1]\n", "", "seeds of arm exact is []"),
        ("seeds = [1, 2]", "seeds = []", "seeds of arm cut is []"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "has 1 twice"),
        ("tuning_seeds = [10]", "tuning_seeds = [1]", "[1] are seeds of arm exact too"),
        ("[arms.cut]", '[arms.cut]\ngrid = { "optim.lr" = 3 }', "arms.cut.grid is {'optim.lr': 3}: write lists"),
        ("[arms.cut]", "[arms.cut]\ngrid = { lr = [3] }", "grid is 'lr': write"),
        ("[arms.cut]", '[arms.cut]\ngrid = { "run.seed" = [3] }', "grid is 'run.seed': leave it out"),
        ("[arms.cut]", '[arms.cut]\ngrid = { "optim.lr" = [-1.0] }', "arm cut.0: optim.lr is -1.0"),
        ('against = "exact"', 'against = "exakt"', "contrasts[0].against is 'exakt': did you mean 'exact'?"),
        ('against = "exact"', 'against = "cut"', "contrasts[0].against is 'cut': name another arm"),
        ('arm = "cut"', 'arms = "cut"', "setting of contrasts[0] is 'arms': did you mean 'arm'?"),
        ("equivalence = 0.01", "equivalence = 0.0", "contrasts[0].equivalence is 0.0"),
        ("mean_recall", "mean_recal", "is 'combined/mean_recal': did you mean 'combined/mean_recall'?"),
        ("eval/seen", "eval/sene", "is 'sene': did you mean 'seen'?"),
        ("eval/seen/combined/mean_recall", "loss", "endpoints is 'loss': write eval/SPLIT/METRIC"),
        ('"tiny"', '"tinny"', "--preset is 'tinny': did you mean 'tiny'?"),
        ("tuning_seeds", "tunning_seeds", "setting of plan is 'tunning_seeds': did you mean 'tuning_seeds'?"),
        ("seeds = [0, 1]\n", "seeds = [0, 1\n", "PLAN is"),
    ],
)
def test_a_mistake_is_one_line(written, old, new, words):
    file = written(old, new)
    with pytest.raises(UserError) as raised:
        load(file)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"PLAN is {str(file)!r}: ")


def test_a_mistake_ends_the_command_with_exit_code_2(written):
    done = run(str(written("cmli_cut", "cmli_cutt")), script="../profiling/ablate.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cmli_cutt" in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "learning").glob("*.toml")), ids=lambda file: file.name)
def test_the_plans_of_the_repository_are_right(file):
    assert load(file).runs()
