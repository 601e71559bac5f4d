"""Files of a checkpoint that somebody has put there, with checksums that fit: one line, and no code is run."""

import json
import os

import pytest
import torch

from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.train_state import read_shared
from ds_cmli.common.errors import UserError
from tests.checkpoint.runs import Evil
from tests.conftest import set_one_process
from tests.drive_train import drive

pytestmark = pytest.mark.usefixtures("alone")
CONTENTS = {
    "rank-0.pt": {
        "code": lambda ran: Evil(ran),
        "a tensor": lambda ran: torch.ones(3),
        "another dictionary": lambda ran: {"sums": torch.ones(1)},
        "wrong values": lambda ran: {"sums": torch.ones(1), "generators": {"python": 3}},
    },
    "state.json": {"a number": lambda ran: 7, "a list": lambda ran: [1], "nothing": lambda ran: None},
}
CASES = [(name, content) for name, contents in CONTENTS.items() for content in contents]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_one_process(patch)
        assert drive([*arguments, str(folder)], stop_at=4) == 85
    return folder


@pytest.mark.parametrize("name, content", CASES)
def test_a_foreign_file_is_refused_in_one_line(name, content, run, arguments, tmp_path):
    file = run / "checkpoint" / "step4" / name
    whole, listed = file.read_bytes(), (file.parent / files.CHECKSUMS).read_bytes()
    value = CONTENTS[name][content](str(tmp_path / "ran"))
    try:
        file.write_text(json.dumps(value)) if name.endswith("json") else torch.save(value, file)
        entries = files.read_checksums(file.parent)
        files.write_checksums(file.parent, entries | {name: files.describe(file)})
        with pytest.raises(UserError) as refused:
            drive([*arguments, str(run)])
    finally:
        file.write_bytes(whole)
        (file.parent / files.CHECKSUMS).write_bytes(listed)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    assert not os.path.exists(tmp_path / "ran")


NUMBERS = ("step", "worse_in_row", "skipped_in_row", "metrics_lines", "world_size", "train_batch_size", "accumulation")
WRONG = [
    *((name, value) for name in NUMBERS for value in (-5, 1.5, "3", None, [], True, 10**12, 10**299)),
    *((name, value) for name in ("sampler", "config") for value in (None, [], "x", 3)),
    *(("sampler", value) for value in ({"epoch": 0}, {"epoch": -1, "position": 0, "length": 9, "seed": 0})),
    *(("best", value) for value in ([], "x", {"metric": "loss"}, {"metric": "m", "value": "x", "step": 1})),
    ("evaluated", 1), ("rebatched", "no"), ("digest", None),
]  # fmt: skip


def test_a_state_of_wrong_values_is_refused_in_one_line(run, tmp_path):
    content = json.loads((run / "checkpoint" / "step4" / "state.json").read_text())
    for name, value in WRONG:
        (tmp_path / "state.json").write_text(json.dumps({**content, name: value}))
        with pytest.raises(UserError, match=f"state.json is damaged: {name}") as refused:
            read_shared(tmp_path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    for name in ("step", "sampler", "config"):
        (tmp_path / "state.json").write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(UserError, match=f"state.json is damaged: {name}.* is None"):
            read_shared(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(content))
    assert read_shared(tmp_path).step == 4
