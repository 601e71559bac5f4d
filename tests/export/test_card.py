"""The model card: numbers of what is exported, licences, and code that runs in its folder."""

import json
import shutil
import subprocess
import sys

import pytest

from ds_cmli.checkpoint.save import FOLDER
from ds_cmli.config.schema import Config
from ds_cmli.evaluate.split import evaluate_split
from ds_cmli.export import card
from ds_cmli.export.card import MEASURES, licences
from tests.conftest import clean_environment
from tests.export.conftest import export, make_run

# Runs the block of the card, in its folder.
BLOCKS = """
import re
(block,) = re.findall(r"(?ms)^```python\\n(.*?)^```", open("README.md").read())
exec(compile(block, "README.md", "exec"))
assert out.logits_per_text.shape == (3, 2)
"""


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """The card's folder and what `evaluate_split` found of each split, with few pairs."""
    by_name = {}

    def few(objective, dataset, *arguments):
        from torch.utils.data import Subset

        split = dataset.split
        by_name[split] = evaluate_split(objective, Subset(dataset, range(40)), *arguments)
        return by_name[split]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "evaluate_split", few)
        folder = export(run, tmp_path_factory.mktemp("card") / "model", "--measure")
    return folder, by_name


@pytest.mark.slow
def test_its_code_runs(measured, tmp_path):
    folder, _ = measured
    env = clean_environment() | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKS]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor([") == 2


@pytest.mark.slow
def test_its_numbers_are_measured_on_what_is_exported(measured):
    folder, result = measured
    card = (folder / "README.md").read_text()
    assert set(result) == {"seen", "unseen"}
    for split, values in result.items():
        for score in ("combined", "cmli", "global", "chance"):
            cells = [f"{values[f'{score}/{name}']:.4f}" for name in MEASURES]
            assert f"| {split} | {score} | {' | '.join(cells)} |" in card
        pointing = f"pointing-game accuracy {values['pointing_game']:.4f}"
        assert f"`{split}`: 40 pairs, 40 pictures, {pointing} (chance 0.25)." in card
        assert f"- {split}: scenes" in card
    assert "Measured on this model, the weights of the run's last checkpoint, in fp32" in card
    assert "0.1235" not in card  # what the run recorded with other weights
    assert "| losses | global (1), cmli (2) |" in card


def test_what_cannot_be_measured_is_said_to_be_the_runs(run, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / FOLDER / "step9").mkdir(parents=True)
    (again / FOLDER / "latest").write_text("step9")
    content = json.loads((again / "config.json").read_text())
    content["config"]["data"]["source"] = str(tmp_path / "gone")
    (again / "config.json").write_text(json.dumps(content))
    (again / "metrics.jsonl").open("a").write('{"step": 8, "eval/seen_ema/global/i2t_r1": 0.5}\n{"st')
    card = (export(again, tmp_path / "model", "--measure") / "README.md").read_text()
    assert "not measured, the card has the run's own results: " in capsys.readouterr().out
    assert "Not measured on this model (the weights after step 9, fp32): recorded by the run itself at step 7" in card
    assert "| seen | global | 0.1235 | - |" in card and "0.5000" not in card
    assert "gone: not known here, add it" in card and "emoji" not in card


@pytest.mark.parametrize(
    ("student", "data", "said"),
    [
        ({}, {}, "MIT by its package"),
        ({"image_weights": "hub"}, {}, "the licence of vit_small_patch14_dinov2, which its page"),
        ({"text_weights": "/home/me/bert.safetensors"}, {}, "'bert.safetensors': its licence is not known here"),
        ({}, {"source": ["/home/me/coco.json", "/x/demo"]}, "coco.json, ./demo: not known here, add it"),
    ],
)
def test_licences(student, data, said):
    result = " ".join(licences(Config.from_dict({"student": student, "data": data})).values())
    assert said in result and "/home" not in result


def test_a_run_without_results_has_none(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    card = (export(run, tmp_path / "model") / "README.md").read_text()
    assert "None: the model was not measured" in card
