"""Every file of a run's folder, a bit flipped or cut off: it is read as it was, refused in one line, or made anew."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_cmli.checkpoint import contents, run_folder
from ds_cmli.checkpoint.save import BEST_WEIGHTS
from ds_cmli.checkpoint.train_state import TrainState
from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS, load_weights
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import load_config
from ds_cmli.data.bad import BAD_FILE, BadFile
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.engine import build_models
from ds_cmli.report.runs import read
from tests.checkpoint.test_restore import TINY
from tests.config.test_mistakes import pairs
from tests.data.test_soak_cache import damaged
from tests.drive_train import drive

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("alone")]
FLIPS, CUTS = 24, 8
GOOD = {"student.safetensors": WEIGHTS, "student_ema.safetensors": AVERAGE, "student-best.safetensors": BEST_WEIGHTS}


def whole_run(folder: Path) -> Path:
    """A run that stopped at step 5 with averages, a best result, bad samples and three checkpoints."""
    data = pairs(folder / "pairs", count=40, broken=2)
    arguments = [*TINY, "--data", data, "--set", "data.max_bad_share=0.5", "--set", "optim.ema_decay=0.5"]
    arguments += ["--set", "run.keep_best=true", "--save-every", "2", "--eval-every", "2", "--log-every", "1"]
    assert drive([*arguments, "--output-dir", str(folder / "run")], stop_at=5) == 85
    return folder / "run"


class Readers:
    """What each command reads of a folder, as plain values."""

    def __init__(self, run: Path):
        config = load_config(run / "config.json", "RUN")
        vocabulary = load_tokenizer("builtin", config.data.context_length).vocab_size
        self.objective, _ = build_models(config, vocabulary, pretrained=False)

    def config(self, run):
        return load_config(run / "config.json", "RUN").to_dict()

    def report(self, run):
        result = read(run)
        return result.settings, result.metrics

    def weights(self, run):
        results = []
        for name in GOOD.values():
            load_weights(run, self.objective, name)
            results.append(sum(x.double().sum().item() for x in self.objective.state_dict().values()))
        return results

    def bad(self, run):
        return sorted(BadFile(run / BAD_FILE, [])._begin())

    def checkpoint(self, run):
        point = contents.find("auto", run)
        state = {**point.state.shared(), "path": point.path.name}
        averages = {name: x.sum().item() for name, x in load_file(point.path / AVERAGE).items()}
        rank = torch.load(point.path / "rank-0.pt", weights_only=True)["sums"].tolist()
        return json.dumps([state, averages, rank], default=str)

    def lines(self, run):
        run_folder._truncate(run / "metrics.jsonl", TrainState(step=99), 0)
        return (run / "metrics.jsonl").read_bytes().splitlines()

    def held(self, run):
        return contents.held(run)


def test_no_damage_gives_other_content(tmp_path, capfd):
    run, draw = whole_run(tmp_path), random.Random(0)
    readers = Readers(run)
    names = ("config", "report", "weights", "bad", "checkpoint", "lines")
    steps = {path.name: shutil.copytree(run, tmp_path / path.name) for path in (run / "checkpoint").glob("step*")}
    expected = {name: [getattr(readers, name)(run)] for name in names}
    for step, copy in steps.items():  # what an older checkpoint says, to which a damaged one gives way
        (copy / "checkpoint" / "latest").write_text(step)
        expected["checkpoint"].append(readers.checkpoint(copy))
    counts = {"as it was": 0, "refused": 0, "a part, named": 0}
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        kept = path.read_bytes()
        for number in range(FLIPS + CUTS):
            path.write_bytes(damaged(kept, draw, cut=number >= FLIPS))
            other = Path(shutil.copytree(run, tmp_path / "other", copy_function=shutil.os.link))
            readers.held(other)
            for name in names:
                if name in ("lines", "bad"):  # which write
                    for file in ("metrics.jsonl", "metrics.jsonl.crc32", BAD_FILE):
                        (other / file).unlink(), shutil.copy(run / file, other / file)
                try:
                    result = getattr(readers, name)(other)
                except UserError as error:
                    assert "\n" not in str(error)
                    counts["refused"] += 1
                    continue
                if result in expected[name]:
                    counts["as it was"] += 1
                    continue
                assert name in ("lines", "bad", "report"), (path, number, name)
                whole = expected[name][0]
                if name == "report":  # lines cut off, as of a run that is being written
                    result, whole = result[1], whole[1]
                assert all(item in whole for item in result) and len(result) <= len(whole), (path, number, name)
                counts["a part, named"] += 1
            shutil.rmtree(other)
        path.write_bytes(kept)
    with capfd.disabled():
        times = f"{FLIPS} flipped bits and {CUTS} cuts of each of {len(files)} files, {len(names)} readers"
        print(f"\n{times}: {counts}, none with other content")
