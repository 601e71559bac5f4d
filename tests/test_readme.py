"""Every command and every piece of Python in README, docs and slurm/README: run here, or listed with its test.

A command that is new or changed fails here until it is entered in one of the tables.
"""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from docs import settings
from ds_cmli import train
from ds_cmli.cmli.contrastive import MAX_SCALE
from ds_cmli.common import cli
from ds_cmli.config.presets import PRESETS
from ds_cmli.config.schema import Config
from ds_cmli.data import assets, scenes
from ds_cmli.data.sources import base
from ds_cmli.faults import preemption
from ds_cmli.losses import over_pairs, regions, sparc
from ds_cmli.memory import out_of_memory
from tests import drive_train
from tests.conftest import ROOT, clean_environment, free_port
from tests.prose import complaints
from tests.run_folder import write_run

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "slurm" / "README.md"]
DEFAULTS = Config()

# Run as they stand, in a folder with a run in the sizes of `tiny` and a folder of pictures.
HERE = [
    "python ds_cmli/train.py --help",
    "python -m ds_cmli.visualize RUN --pairs 0,1,2 --output maps",
    "python -m ds_cmli.report RUN --output report.html",
]
# The same in processes of their own, with the mark `slow`.
SLOW = [
    "python -m ds_cmli.export RUN DIR",
    "python profiling/predict.py --preset paper --world-size 2",
    "python profiling/predict.py --preset paper --world-size 2 --fit 24GB",
    'ds-cmli-memory fits --gpu "A100 80GB" -- train_gpt.py --batch-size 8',
]

# Trainings that are started as they stand, with the mark `slow`, and stopped in their first steps.
STARTED = [
    "deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json",
    "deepspeed ds_cmli/train.py --data pictures --output-dir runs/mine",
    "deepspeed --num_accelerators 2 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json",
    "torchrun --nproc_per_node 2 ds_cmli/train.py",
    "python ds_cmli/train.py --losses global,cmli=0.5",
    "python ds_cmli/train.py --set student.patch_keep=0.5",
    "python ds_cmli/train.py --profile-memory 2",
    "python ds_cmli/train.py --profile 5:8",
    'python ds_cmli/train.py --set \'student.lora={"image": ["qkv", "attn.proj"], "text": ["query", "value"]}\'',
    "python ds_cmli/train.py --data pictures --set data.aspect_patch=14 --set 'student.image_overrides="
    '{"use_naflex": true}\' --set \'teacher.overrides={"use_naflex": true}\'',
]

# Run by another test with smaller models or other data, or by none, with the reason.
ELSEWHERE = {
    "git clone https://github.com/OWNER/ds-cmli && cd ds-cmli": "pyproject.toml: OWNER is to be filled in",
    "python3 -m venv .venv && . .venv/bin/activate": ".ci/run: CI's own environment",
    "pip install --no-compile torch torchvision --index-url https://download.pytorch.org/whl/cpu": ".ci/run: a network",
    "pip install --no-compile -e .": ".ci/run: CI's own command, with the tests' packages",
    "pip install --no-compile -e '.[test]' && pytest -n 3": ".ci/run: CI's own command",
    "pip install -e '.[plots]'": "pyproject.toml: a part of what the tests need",
    "python -m ds_cmli.evaluate --checkpoint runs/mine": "tests/evaluate/test_command.py: a run of `tiny`",
    "python -m profiling.speed.cmli": "tests/profiling/speed/test_benchmark.py: `tiny`",
    "sbatch --array=0-4 --gpus-per-node=1 --cpus-per-gpu=8 slurm/train.sh --losses global,cmli --seed %a "
    "--output-dir runs/without/%a":
        "tests/slurm/test_around.py: arrays",
    "sbatch --array=0-4 --gpus-per-node=1 --cpus-per-gpu=8 slurm/train.sh --losses global,cmli,target_cmli=0.1 "
    "--seed %a --output-dir runs/with/%a":
        "tests/slurm/test_around.py: arrays",
    "torchrun --nproc_per_node 8 --max-restarts 3 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json "
    "--output-dir runs/cmli":
        "tests/faults/test_restarts.py: two ranks of `tiny`",
    "DS_CMLI_JOB=cmli torchrun --nnodes 1:4 --nproc_per_node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id "
    "cmli --rdzv-endpoint NODE:29400 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json --output-dir "
    "runs/cmli":
        "tests/faults/test_restarts.py: two nodes of one rank",
    "deepspeed ds_cmli/train.py --data 'shards/{00000..00999}.tar'": "tests/data/sources/test_tars.py: few shards",
    "deepspeed ds_cmli/train.py --data 'cc12m/{00000..01242}.tar::0.7' --data coco/dataset_coco.json::0.3 "
    "--val-data coco/dataset_coco.json":
        "tests/data/sources/test_registry.py: a mixture of small sources",
    "deepspeed ds_cmli/train.py --preset paper --set student.image_model=convnext_tiny --set "
    "student.text_model=roberta-base --set data.tokenizer=roberta-base":
        "tests/models/test_encoders.py: small ones",
    "python -m ds_cmli.evaluate openai/clip-vit-base-patch32 --data coco/dataset_coco.json --split test":
        "tests/export/test_library.py: a small model by its folder",
    "deepspeed ds_cmli/train.py --preset finetune --start-from openai/clip-vit-base-patch32 --data "
    "coco/dataset_coco.json --output-dir runs/coco":
        "tests/models/test_dual_training.py: a small model by its folder",
    "python -m ds_cmli.evaluate openai/clip-vit-base-patch16 --data photos": "tests/models/test_dual_training.py",
    "deepspeed ds_cmli/train.py --preset finetune --start-from openai/clip-vit-base-patch16 --data photos "
    "--output-dir runs/photos":
        "tests/models/test_dual_training.py: a small model by its folder",
    "python -m ds_cmli.report runs/photos": "tests/report/test_report.py: runs of `tiny`",
    "python -m ds_cmli.export runs/photos photos-clip --as clip --interpolate 0.5":
        "tests/models/test_dual_training.py: a small run",
    "pip install img2dataset": "docs/finetune.md: another project's command",
    "img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption --output_format "
    "webdataset --output_folder cc3m --processes_count 16 --thread_count 64 --image_size 256 --resize_mode keep_ratio":
        "docs/finetune.md: another project's command",
    "img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format "
    "webdataset --output_folder cc12m --processes_count 16 --thread_count 64 --image_size 256 --resize_mode keep_ratio":
        "docs/finetune.md: another project's command",
    "img2dataset --url_list mscoco.parquet --input_format parquet --url_col URL --caption_col TEXT --output_format "
    "webdataset --output_folder mscoco --processes_count 16 --thread_count 64 --image_size 256 --resize_mode "
    "keep_ratio":
        "docs/finetune.md: another project's command",
    "deepspeed ds_cmli/train.py --start-from runs/coco --data other/dataset.csv --losses global,cmli,sparc":
        "tests/models/test_dual_training.py: a small run",
    "python -m ds_cmli.export runs/coco coco-clip --as clip": "tests/export/test_library.py",
    "python -m ds_cmli.export RUN DIR --as clip": "tests/export/test_library.py",
    "python ds_cmli/train.py --plugin my_cmli --losses global,warm=0.5": "tests/test_readme.py: `tiny`",
    "python -m ds_cmli.evaluate --plugin my_cmli --checkpoint RUN": "tests/config/test_plugins.py: the option",
    "python -m ds_cmli.evaluate --checkpoint runs/quick-... --data demo": "tests/test_train.py: a run of `tiny`",
    "python -m ds_cmli.evaluate --checkpoint RUN --data coco/dataset_coco.json --split test --fold-size 1000":
        "tests/evaluate/test_command.py: small JSON",
    "python -m ds_cmli.evaluate --checkpoint RUN --zero-shot imagenet/val --class-names names.txt --templates "
    "prompts.txt":
        "tests/evaluate/test_command.py: few classes",
    "python -m ds_cmli.evaluate --checkpoint RUN --boxes Flickr30kEntities --image-root flickr30k-images "
    "--split test":
        "tests/evaluate/test_command.py: few boxes",
    "ds-cmli-evaluate openai/clip-vit-base-patch32 --suite benchmarks.toml":
        "tests/evaluate/suites/test_compare.py: small lists",
    "ds-cmli-evaluate RUN OTHER --suite benchmarks.toml --json results.json --page results.html":
        "tests/evaluate/suites/test_compare.py: small lists",
    "python -c \"import json; from dataset_zoo import COCO_Order as Order; json.dump(Order(root_dir='coco')"
    ".test_cases, open('coco/coco_order.json', 'w'))\"":
        "docs/evaluation.md: another project's command",
    'ds-cmli-memory fits --world-size 8 --gpu "A100 80GB" -- train_fsdp.py': "tests/fits/test_fits.py: four ranks",
    "python ds_cmli/train.py --data pairs/ --set data.negatives=field --set data.negatives_count=2": (
        "tests/data/test_wrong_captions.py: sources of each kind"
    ),
    "python ds_cmli/train.py --data captions.json --set data.captions=4 --losses global,cmli": (
        "tests/data/test_captions.py: a folder's pictures"
    ),
    'ds-cmli-memory fits --fit --gpu "A100 80GB" -- train.py --batch-size {}': "tests/fits/test_largest.py: a loop",
    'ds-cmli-memory fits --engine null --gpu "A100 80GB" -- train_gpt.py --batch-size 8':
        "tests/fits/test_null_gpu.py: a smaller loop",
    "python profiling/predict.py --preset paper --sweep batch=128,256,world=1,2,8,stage=1,2,3":
        "tests/memory/test_predict.py: small models",
    "python profiling/compare_estimates.py": "tests/profiling/memory/test_compare.py: small sizes",
    "python -m profiling.memory.estimators --plot estimators.png":
        "tests/profiling/memory/test_estimators.py: the first settings",
    "python -m profiling.speed.step": "tests/profiling/speed/test_benchmark.py: `tiny`",
    "python profiling/gpu_check.py": "tests/gpu/test_harness.py: what it runs; whole it needs a GPU",
}  # fmt: skip

# Sentences with figures, and what the code has. A star in a sentence stands for the figure.
CHANCE = f"{16 / (3 * scenes.EVAL_SCENES):.3f}"  # of mean recall
FETCHED = sum(assets.ASSETS[name].megabytes for name in ("pictures", "vit", "minilm"))
(LEAD,) = re.findall(r"--signal=\S*TERM@(\d+)", (ROOT / "slurm" / "train.sh").read_text("utf-8"))
CLAIMS = [
    ("README.md", "downloads * MB of pictures and weights", FETCHED),
    ("docs/install.md", "The demo's assets, * MB", FETCHED),
    ("docs/train.md", "scores, chance *. Each caption", CHANCE),
    ("docs/train.md", "and 0.34; chance is *.", f"{1 / scenes.EVAL_SCENES:.3f}"),
    ("docs/train.md", "| training | * |", f"{scenes.TRAIN_SCENES:,}"),
    ("docs/train.md", "held out | * new scenes", scenes.EVAL_SCENES),
    ("docs/train.md", "or * of its images, at most 1,000", f"{base.HELD_OUT_SHARE:.0%}"),
    ("docs/train.md", "images above * megapixels", DEFAULTS.data.max_pixels // 10**6),
    ("docs/train.md", "More than * of the training set", f"{DEFAULTS.data.max_bad_share:.0%}"),
    ("docs/train.md", "`--save-minutes` (*)", f"{DEFAULTS.run.save_minutes:.0f}"),
    ("docs/train.md", "`--keep` (*) stay", DEFAULTS.run.keep),
    ("docs/train.md", "ends with exit code *.", preemption.EXIT_CODE),
    ("docs/train.md", "1/temperature is at most *.", f"{MAX_SCALE:.0f}"),
    ("docs/train.md", "all pairs, InfoNCE | * |\n| `cmli`", DEFAULTS.loss.init_temperature),
    ("docs/train.md", "tokens of all pairs, InfoNCE | * |", DEFAULTS.loss.cmli_init_temperature),
    ("docs/train.md", "class tokens, SigLIP's sigmoid loss | * |", over_pairs.GlobalSigmoid.init_temperature),
    ("docs/train.md", "tokens, SigLIP's sigmoid loss | * |\n| `target_cmli`", over_pairs.CMLISigmoid.init_temperature),
    ("docs/train.md", "(SPARC, Bica et al., 2024) | * |", sparc.Sparc.init_temperature),
    ("docs/train.md", "see [below](#boxes-with-phrases) | * |", regions.Regions.init_temperature),
    ("docs/train.md", "`loss.cmli_gather_bytes` (* GiB)", DEFAULTS.loss.cmli_gather_bytes // 2**30),
    ("docs/fits-accuracy.md", "holds * short programs", len(list((ROOT / "profiling/fits/programs").glob("*.py")))),
    ("docs/troubleshooting.md", "hangs: no progress for * s", f"{DEFAULTS.run.watchdog:.0f}"),
    ("docs/troubleshooting.md", "`run.most_skipped` (*)", DEFAULTS.run.most_skipped),
    ("docs/troubleshooting.md", "the advice took over * s", out_of_memory.ADVICE_SECONDS),
    ("docs/method.md", "else -1; b starts at *", f"{over_pairs.GlobalSigmoid.init_bias:.0f}"),
    ("docs/method.md", "averaged over (3) and (4); b starts at *", f"{over_pairs.CMLISigmoid.init_bias:.0f}"),
    ("slurm/README.md", "| * s before the time limit", LEAD),
]


def blocks(language: str) -> list[str]:
    """Of all pages, the contents of the fenced blocks of a language; "": commands."""
    every = [pair for page in DOCS for pair in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text("utf-8"))]
    return [body for entry, body in every if entry == language]


def commands() -> set[str]:
    """Every line of a block without a language, without what stands behind a #."""
    return {line.split("  #")[0].strip() for body in blocks("") for line in body.splitlines() if line.strip()}


def test_every_command_is_run_or_has_its_reason():
    assert commands() == {*HERE, *SLOW, *STARTED, *ELSEWHERE}
    for reason in ELSEWHERE.values():
        assert (ROOT / reason.split(":")[0]).is_file(), reason


def test_options_of_trainings_exist():
    """Those of Slurm's page, too, which needs a cluster: each is one that the command has."""
    page = (ROOT / "slurm" / "README.md").read_text("utf-8")
    lines = [*commands(), *re.findall(r"sbatch [^`\n]*slurm/train\.sh[^`\n]*", page)]
    assert len(lines) > 60
    options = {"--help"} | {name for option in train.command.params for name in option.opts}
    for line in lines:
        match = re.search(r"(?:ds_cmli/train\.py|slurm/train\.sh(?=.* -- ).* -- |slurm/train\.sh)(.*)", line)
        for word in re.findall(r"(?<=\s)--[\w-]+", match[1]) if match else ():
            assert word in options, line


def test_scripts_of_slurm_are_shell():
    page = (ROOT / "slurm" / "README.md").read_text("utf-8")
    for body in re.findall(r"(?ms)^```\n(.*?)^```", page):
        script = body.replace("[sbatch options]", "").replace("[options of ds_cmli/train.py]", "")
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, sentence, figure", CLAIMS)
def test_figures_are_those_of_the_code(name, sentence, figure):
    page = " ".join((ROOT / name).read_text("utf-8").split())
    assert " ".join(sentence.replace("*", str(figure)).split()) in page


def test_numbers_of_finetune_are_the_presets():
    page, result = (ROOT / "docs" / "finetune.md").read_text("utf-8"), []
    for section, key, rest in re.findall(r"(?m)^\| `(\w+)\.(\w+)`(.*) \|$", page):
        cells = [cell.strip() for cell in rest.split("|")]
        if len(cells) != 3:
            continue  # of another table
        value = PRESETS["finetune"].get(section, {}).get(key, getattr(getattr(DEFAULTS, section), key))
        if isinstance(value, dict):
            (value,) = value.values()
        written = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert cells[1] in (written, "the source's"), key
        result.append(key)
    assert len(result) == 10


def test_messages_of_troubleshooting_are_printed():
    """The pieces between what varies (`...`, numbers, names in quotes) are in strings of the package."""
    strings = []
    for file in (ROOT / "ds_cmli").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text("utf-8")))
        strings += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    missing = []
    for message in re.findall(r"(?m)^\| `([^`]+)`", page):
        for piece in re.split(r"\.\.\.|'[^']*'|\d+", message):
            if len(piece.strip()) > 6 and not any(piece.strip() in string for string in strings):
                missing.append(piece)
    assert not missing


def test_settings_are_up_to_date():
    assert settings.PAGE.read_text("utf-8") == settings.page(), "python docs/settings.py writes it"
    assert "|  |" not in settings.page(), "a setting without a comment"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_and_paragraphs_are_short(page):
    assert not complaints(page.read_text("utf-8"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 700


def test_links_lead_somewhere():
    """To a file of the repository, and to a heading in it."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "null_gpu" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), (page.name, target)
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8")) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, (page.name, target)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the commands are run: RUN, PICTURES and data are there."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("reader")
    for name in ("RUN", "PICTURES", "pictures"):
        (folder / name).mkdir()
    write_run(folder / "RUN")
    (folder / "RUN" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5, "loss/global": 2.0, "lr": 0.001}\n')
    rows = ["file_name,text"]
    for i in range(160):
        rows.append(f"{i}.jpg,picture number {i}")
        Image.fromarray(np.full((30, 40, 3), i, np.uint8)).save(folder / "pictures" / f"{i}.jpg")
    (folder / "pictures" / "metadata.csv").write_text("\n".join(rows))
    for i in range(3):
        shutil.copy(folder / "pictures" / f"{79 * i}.jpg", folder / "PICTURES")
    (folder / "train_gpt.py").write_text(
        "import torch\nmodel = torch.nn.Linear(8, 8).cuda()\noptimizer = torch.optim.AdamW(model.parameters())\n"
        "for _ in range(3):\n    model(torch.ones(8, 8).cuda()).sum().backward()\n    optimizer.step()\n"
    )
    for name in ("ds_cmli", "ds_configs", "profiling"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


@pytest.mark.parametrize("line", HERE)
def test_a_command_as_it_stands(line, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(line)
    path, module = None, None
    if arguments[0] == "-m":
        module, arguments = arguments[1], arguments[2:]
    elif program == "python":
        path, arguments = arguments[0], arguments[1:]
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts change it
    monkeypatch.setattr(cli, "leave", sys.exit)  # commands end their process at once
    monkeypatch.setattr(sys, "argv", [path or program, *arguments])
    for name in (module, f"{module}.__main__") if module else ():
        monkeypatch.delitem(sys.modules, name, raising=False)  # runpy warns of one that is imported
    with pytest.raises(SystemExit) as ended:
        if path:
            runpy.run_path(path, run_name="__main__")
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code, capfd.readouterr().err
    for name in (arguments[i + 1] for i, word in enumerate(arguments) if word in ("--output", "--page")):
        assert Path(name).stat().st_size > 1000


def environment() -> dict[str, str]:
    """That of a shell with the environment of these tests activated."""
    return clean_environment() | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.slow
@pytest.mark.parametrize("line", SLOW)
def test_a_long_command_as_it_stands(line, place):
    done = subprocess.run(
        ["bash", "-c", line], cwd=place, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", STARTED)
def test_a_training_as_it_stands(line, place):
    """It begins to train; a signal to its ranks then stops it."""
    env = environment() | {"MASTER_PORT": str(free_port())}
    started = subprocess.Popen(
        ["bash", "-c", f"exec {line}"], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert started.stdout is not None
    printed = ""
    for text in started.stdout:
        printed += text
        if text.startswith("parameters:"):
            for rank in ranks_of(started.pid):
                rank.terminate()
    started.wait(60)
    assert "parameters:" in printed and "\nstopped " in printed, printed


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes from a launcher down that run `train.py` themselves."""
    results = []
    process = psutil.Process(launcher)
    for item in (process, *process.children(recursive=True)):
        script = next((word for word in item.cmdline()[1:] if not word.startswith("-")), "")
        if script.endswith("ds_cmli/train.py"):
            results.append(item)
    return results


def test_python_of_inference(place, monkeypatch):
    monkeypatch.chdir(place)
    result = [body for body in blocks("python") if "ds_cmli.inference" in body]
    assert len(result) == 2  # README and docs/use.md
    for code in result:
        code = re.sub(r"runs/[\w-]+", "RUN", code)
        exec(compile(code, "README", "exec"), {})


def test_python_of_metrics():
    (code,) = [body for body in blocks("python") if "ds_cmli.evaluate" in body]
    by_name: dict[str, object] = {}
    exec(compile(re.sub(r"(?m)^(recalls|phrase_hits)", r"\1_ = \1", code), "docs/evaluate.md", "exec"), by_name)
    assert by_name["recalls_"]["i2t_r1"] == 1.0 and by_name["phrase_hits_"].tolist() == [True]


def test_python_of_a_training(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = [body for body in blocks("python") if "ds_cmli.fit(" in body]
    by_name: dict[str, object] = {}
    exec(compile(code, "docs/python.md", "exec"), by_name)
    assert by_name["run"].metrics["step"] == 3


def test_python_of_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arm, gain in (("without", 0.0), ("with", 0.1)):
        for seed in range(5):
            folder = tmp_path / "runs" / arm / str(seed)
            folder.mkdir(parents=True)
            lines = ({"step": 1, "loss": 2.0}, {"step": 1, "eval/unseen/combined/mean_recall": gain * (1 + seed)})
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (code,) = [body for body in blocks("python") if "import pandas" in body]
    exec(compile(code, "docs/results.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n+0.3000 +- 0.1963\n")  # of 0.1 to 0.5: 2.776 * 0.1581 / sqrt(5)


def test_python_of_a_plugin(plugins, alone, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for body in blocks("python"):
        if name := re.match(r"# (my_cmli/\w+\.py)\n", body):
            (tmp_path / name[1]).parent.mkdir(exist_ok=True)
            (tmp_path / name[1]).write_text(body)
    given = "--plugin my_cmli --losses global,warm=0.5 --preset tiny --steps 1 --set run.match_maps=0 --output-dir"
    assert drive_train.drive([*given.split(), str(tmp_path / "run")]) == 0
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert float(re.search(r'"temperature/warm": ([\d.]+)', logged)[1]) == pytest.approx(0.2, rel=0.01)


def test_python_of_exported_models_is_named():
    """tests/export runs it: DIR is a folder that a fresh process loads with and without trust.

    tests/cmli/test_recipes.py runs those of the all-pairs op.
    """
    assert len(blocks("python")) == 11
    (code,) = [body for body in blocks("python") if "AutoModel" in body]
    compile(code, "docs/use.md", "exec")
