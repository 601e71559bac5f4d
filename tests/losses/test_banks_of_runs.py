"""Banks and queues in trainings: on two ranks as on one, going on there, and after a change of their size."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ds_cmli import engine
from ds_cmli.checkpoint.weights import BANKS
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.data.load import build_data
from ds_cmli.distributed import process_group as distributed
from tests.checkpoint.test_restore import json_file, ranks, source  # noqa: F401
from tests.conftest import spawn
from tests.drive_train import drive as train
from tests.losses.test_bank import BOTH
from tests.losses.test_queue import QUEUE
from tests.metrics_file import metrics
from tests.models.test_lora import SETTING as LORA

Found = tuple[Tensor, dict[str, dict[str, Tensor]]]  # losses, and the buffers of each bank by name


def of_one_and_of_two(stages: tuple[int, ...], sections: dict[str, dict]) -> tuple[dict[int, Found], list]:
    """What one rank finds at each stage, and each of two, with eight pairs over all ranks."""
    [alone] = spawn(_at_stages, 1, stages, sections)
    return alone, spawn(_at_stages, 2, stages, sections)


def _at_stages(rank: int, world: int, stages: tuple[int, ...], sections: dict[str, dict]) -> dict[int, Found]:
    return {stage: _three_steps(rank, world, stage, sections) for stage in stages}


def _three_steps(rank: int, world: int, stage: int, sections: dict[str, dict]) -> Found:
    optim = {**sections.get("optim", {}), "micro_batch": 8 // world}
    one_block = {"student": {"layers": 1}, "teacher": {"block": 0}}
    config = load_preset("tiny", {**one_block, **sections, "optim": optim})
    data = build_data(config.data, 0)
    ds_config = DeepSpeedConfig.of({"zero_optimization": {"stage": stage}}).filled(config.optim, world, 3)
    train_engine = engine.build(config, ds_config, data.vocab_size, 3, torch.device("cpu"))
    losses = []
    for step in range(3):
        numbers = range(8 * step + rank * 8 // world, 8 * step + (rank + 1) * 8 // world)
        [result] = train_engine.step([data.collate([data.train[n] for n in numbers])])
        losses.append(distributed.mean_over_ranks(result.stacked()))
    banks = {name: dict(bank.named_buffers()) for name, bank in train_engine.objective.banks().items()}
    train_engine.engine.destroy()
    return torch.stack(losses), banks


# The sections of a configuration, ZeRO stages, and how far banks may differ.
KINDS = {
    "queue": ({**QUEUE, "optim": {"negatives": "queue:20"}}, (1, 2, 3), 1e-4),
    "bank": ({"loss": {"weights": {"cmli": 1.0, **BOTH}, "bank": 20}}, (0, 2, 3), 1e-5),
}


@pytest.fixture(scope="module", params=KINDS)
def of_both(request):
    sections, stages, tolerance = KINDS[request.param]
    return of_one_and_of_two(stages, sections), tolerance


def test_two_ranks_train_as_one(of_both):
    (alone, ranks), tolerance = of_both
    for stage, (one, banks) in alone.items():
        for losses, theirs in (rank[stage] for rank in ranks):
            assert_close(losses, one, rtol=1e-5, atol=1e-6)
            for name, bank in banks.items():
                assert_close(theirs[name], bank, rtol=tolerance, atol=tolerance)


TINY = ["--preset", "tiny", "--steps", "8", "--set", "run.match_maps=0", "--set", "student.layers=1"]
WITH_BANK = ["--losses", "cmli,token_contrast,cls_contrast", "--set", 'loss.start={"cls_contrast": 4}']
WITH_BANK += ["--set", "teacher.average_blocks=2", "--set", "loss.bank=30"]
WITH_QUEUE = ["--losses", "global,cmli", "--set", "optim.negatives=queue:30,tokens:12"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [WITH_BANK, [*LORA, "--set", "teacher.block=0"]], ids=["bank", "lora"])
def test_two_ranks_go_on_where_one_was(settings, source, tmp_path, alone):  # noqa: F811
    straight, broken = (["--output-dir", str(tmp_path / name)] for name in ("straight", "broken"))
    arguments = [*TINY, *settings, *source, *json_file(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})]
    assert train([*arguments, *straight]) == 0
    assert train([*arguments, *broken], stop_at=5) == 85
    codes, _ = ranks(tmp_path, 2, [{"arguments": [*arguments, *broken]}])
    assert codes == [0]
    runs = [tmp_path / name for name in ("straight", "broken")]
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in runs]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    if settings == WITH_BANK:
        banks = [torch.load(run / "checkpoint" / "step8" / BANKS) for run in runs]
        assert_close(banks[1], banks[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, change, lines, name",
    [
        (WITH_BANK, ("bank=30", "bank=40"), ["loss.bank: 30 -> 40"], "cls_contrast"),
        (WITH_QUEUE, ("queue:30,tokens:12", "queue:40"), [
            'optim.negatives: "queue:30,tokens:12" -> "queue:40"', "optim.negatives: the bank of global starts empty",
        ], "global"),
    ],
    ids=["bank", "queue"],
)  # fmt: skip
def test_one_of_another_size_starts_empty(settings, change, lines, name, source, tmp_path, alone, capfd):  # noqa: F811
    arguments = [*TINY, *settings, *source, "--output-dir", str(tmp_path)]
    assert train(arguments, stop_at=5) == 85
    other = [word.replace(*change) for word in arguments]
    assert train(other, mistakes=True) == 2
    assert lines[0] in capfd.readouterr().out
    assert train([*other, "--resume-with-changes"]) == 0
    assert lines[-1] in capfd.readouterr().out or name != "global"
    assert torch.load(tmp_path / "checkpoint" / "step8" / BANKS)[name]["entered"] == 3 * 8
