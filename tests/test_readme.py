"""The pages' Python runs, README's commands run, and options and links of the pages lead somewhere."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import pytest

from docs import settings
from ds_cmli import train
from ds_cmli.config.registry import IMAGE, LOSSES
from ds_cmli.config.schema import load_config
from tests import make
from tests.make import write_run
from tests.models.sources import clip
from tests.ranks import ROOT, clean_environment, free_port
from tests.stranger.drive import check_memory, used

README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "slurm" / "README.md"]
SMALLER = {
    "train.py": "--log-every 1",
    "compare_estimates.py": "--B 16 --P 1 --only E1,E2,E3,E5",  # E4 and a whole step: tests/profiling
    "predict.py": "--preset tiny --losses global --set student.layers=1 --fit 1185MB",
}
PROGRAMS = "(python|deepspeed|torchrun|ds-cmli-[a-z]+) "  # of README's commands; others install or submit


def blocks(language: str, pages: list[Path] = DOCS) -> list[str]:
    """Return the contents of the fenced blocks of a language; "": commands."""
    fenced = [pair for page in pages for pair in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text("utf-8"))]
    return [body for entry, body in fenced if entry == language]


def commands(pages: list[Path]) -> list[str]:
    """Return every line of a block without a language, up to a #."""
    return [line.split("  #")[0].strip() for body in blocks("", pages) for line in body.splitlines() if line.strip()]


def test_options_of_trainings_exist():
    page = (ROOT / "slurm" / "README.md").read_text("utf-8")
    options = {"--help"} | {name for option in train.command.params for name in option.opts}
    for line in [*commands(DOCS), *re.findall(r"sbatch [^`\n]*slurm/train\.sh[^`\n]*", page)]:
        match = re.search(r"(?:ds_cmli/train\.py|slurm/train\.sh(?=.* -- ).* -- |slurm/train\.sh)(.*)", line)
        for word in re.findall(r"(?<=\s)--[\w-]+", match[1]) if match else ():
            assert word in options, line


def test_settings_are_up_to_date():
    assert settings.PAGE.read_text("utf-8") == settings.page(), "python docs/settings.py writes it"
    assert "|  |" not in settings.page(), "a setting without a comment"


def test_links_lead_to_files():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run in the sizes of `tiny`, RUN, a CLIP, pictures with captions, and the metrics of ten runs."""
    folder = tmp_path_factory.mktemp("reader")
    write_run(folder / "RUN")
    clip(folder / "photos-clip")
    make.pairs(folder / "pictures", 160)
    make.pictures(folder / "pictures", *(f"{i}.jpg" for i in range(10)))  # as the pages name some
    for (arm, gain), seed in product({"without": 0.0, "with": 0.1}.items(), range(5)):
        lines = ({"step": 1, "loss": 2.0}, {"step": 1, "eval/unseen/combined/mean_recall": gain * (1 + seed)})
        make.json_file(folder / "runs" / arm / str(seed) / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    for name in ("ds_cmli", "ds_configs", "profiling"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
def test_commands_of_the_readme(place):
    """Run trainings until they train, all others to their end, with RUN in a run's place and at smaller sizes."""
    # The environment of a shell in which this one is active.
    env = clean_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    lines = [line for line in commands([README]) if re.match(PROGRAMS, line)]
    assert len(lines) >= 4
    for line in lines:
        if "train.py" not in line:
            line = re.sub(r"runs/[\w-]+", "RUN", line)
        line += "".join(f" {more}" for script, more in SMALLER.items() if script in line)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=place, env=env, **pipes)
        printed = ""
        for text in started.stdout or ():  # until its ranks have ended too
            printed += text
            if text.startswith("step "):
                started.terminate()  # the launcher, whose end the ranks notice
        code = started.wait(60)
        assert "\nstopped " in printed if "train.py" in line else code == 0, (line, printed)


PYTHON = {  # what the names that a page leaves are like
    "README.md": "0 < value.item() < 5",
    "evaluate.md": "recalls(scores, scores, torch.tensor([0, 0, 1]))['i2t_r1'] == 1.0",
    "finetune.md": "model.config.projection_dim == 24",
    "op.md": "0 < loss.item() < 3",
    "python.md": "run.metrics['step'] == 3",
    "results.md": "abs(difference.mean() - 0.3) < 1e-9 and abs(half - 0.1963) < 1e-4",  # 2.776 * 0.1581 / sqrt(5)
    "use.md": "out.logits_per_image.shape == (1, 1)",
}


WITH_PYTHON = [page for page in DOCS if blocks("python", [page]) and page.name != "plugins.md"]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page(page, place, monkeypatch, alone):
    """Its blocks run one after the other."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    names: dict[str, object] = {"RUN": "RUN", "picture": make.picture(1)}
    for body in blocks("python", [page]):
        exec(compile(re.sub(r'load\("runs/[\w-]+"', 'load("RUN"', body), page.name, "exec"), names)
    assert eval(PYTHON[page.name], names), PYTHON[page.name]


@mock.patch.dict(LOSSES)
@mock.patch.dict(IMAGE)
def test_python_of_a_plugin(tmp_path, source, monkeypatch):
    """The page's loss beside an encoder of another plugin: trained, evaluated, exported, its memory predicted."""
    monkeypatch.syspath_prepend(tmp_path)
    for body in blocks("python"):
        if name := re.match(r"# (my_cmli/\w+\.py)\n", body):
            make.json_file(tmp_path / name[1], body)
    model = {"student.image_backbone": "toy", "student.image_model": "toy", "student.image_weights": "random"}
    run = tmp_path / "run"
    options = {"--plugin": "my_cmli", "--losses": "warm,global=0.5", "--output-dir": run, "--micro-batch": 8}
    words = make.small({**options, "--steps": 3, "--log-every": 1}, model)
    assert not make.train(*words, "--plugin", "tests.stranger.toy", *source)
    for line in make.lines(run):
        assert line["loss"] == pytest.approx(line["loss/warm"] + 0.5 * line["loss/global"], rel=1e-5)
        assert line["temperature/warm"] == pytest.approx(0.2, rel=0.01)
    assert [name for name in used(run) if name.endswith("/cmli/i2t_r1")], "the evaluation has no scores of CMLI"
    check_memory(load_config(run / "run.json", "the run"), {"zero_optimization": {"stage": 2}}, 2)
