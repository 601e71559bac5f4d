"""`--resume-report`: what a folder holds, how a start would go on, why not; and it changes nothing."""

import json

import pytest

from ds_cmli.checkpoint import lock
from ds_cmli.common.errors import UserError
from tests.config.test_mistakes import pairs
from tests.drive_train import drive

pytestmark = pytest.mark.usefixtures("alone")
REPORT = "--resume-report"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    data = pairs(tmp_path_factory.mktemp("data") / "pairs", count=33)
    return ["--preset", "tiny", "--steps", "4", "--save-every", "2", "--data", data, "--set", "run.match_maps=0"]


def everything(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_its_damage_and_its_lock(arguments, tmp_path, capsys):
    folder, said = tmp_path / "run", lambda: capsys.readouterr().out.splitlines()
    to = [*arguments, "--output-dir", str(folder)]

    assert drive([*to, REPORT]) == 0
    fresh = said()
    assert f"{folder} holds no run" in fresh and not folder.exists()
    assert fresh[-1] == "would start with step 1 of 4, 8 pairs a step on 1 rank"

    assert drive(to) == 0
    before = everything(folder)
    said()
    assert drive([*to, REPORT]) == 0
    lines = said()
    assert any(line.startswith(f"{folder}: preset tiny, started 20") for line in lines)
    whole = [line for line in lines if line.startswith("  checkpoint/")]
    assert [line.partition(":")[0] for line in whole] == ["  checkpoint/step2", "  checkpoint/step4 (latest)"]
    assert " MB, written by 1 rank at ZeRO stage 2, best " in whole[1]
    assert "  weights: student.safetensors" in lines
    assert lines[-1].startswith(f"the run in {folder} is finished, 4 steps")

    # The newest is cut off: the one before would be taken, of which an evaluation is due as it has no result.
    state = folder / "checkpoint" / "step4" / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    damaged = everything(folder)
    assert drive([*to, REPORT]) == 0
    lines = said()
    assert "  checkpoint/step4 (latest): damaged: state.json has " in "\n".join(lines)
    assert any(line.startswith(f"resuming from {folder}/checkpoint/step2") for line in lines)
    assert lines[-1] == "would go on with step 3 of 4, 8 pairs a step on 1 rank"

    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.5.* --resume-with-changes"):
        drive([*to, REPORT, "--lr", "0.5"])
    assert drive([*to, REPORT, "--lr", "0.5", "--resume-with-changes"]) == 0
    assert "with changes: deepspeed.optimizer.params.lr: 0.001 -> 0.5; optim.lr" in capsys.readouterr().out

    holder = lock.Lock(folder)
    (folder / lock.NAME).write_text(json.dumps(holder.mine))
    with pytest.raises(UserError, match=r"in use since .* end that run"):
        drive([*to, REPORT])
    assert "  checkpoint/step2: whole" in capsys.readouterr().out
    (folder / lock.NAME).unlink()
    assert everything(folder) == damaged and before.keys() == damaged.keys()
