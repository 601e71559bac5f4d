"""Every command and every piece of Python in README and docs: run here, or listed with the test that runs it.

A command that is new or changed fails here until it is entered in one of the two tables.
"""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from ds_cmli.common import cli
from tests.conftest import ROOT
from tests.run_folder import write_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Run as they stand, in a folder with a run in the sizes of `tiny` and a folder of pictures.
HERE = [
    "python ds_cmli/train.py --help",
    "python -m ds_cmli.visualize RUN --pairs 0,1,2 --output maps.html",
    "ds-cmli-search INDEX --build PICTURES --model RUN",
    'ds-cmli-search INDEX "a red car" --page results.html',
    "python -m ds_cmli.report RUN --output report.html",
]
SCRIPTS = {"ds-cmli-search": "ds_cmli.inference.search"}

# Run by another test with smaller models or other data, or by none, with the reason.
ELSEWHERE = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e .": ".ci/run: CI's own environment",
    "pip install -e '.[test]' && pytest -n 3": ".ci/run: CI's own command",
    "pip install -e '.[plots]'": "pyproject.toml: a part of what the tests need",
    "deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json": "tests/test_train.py: four steps of `tiny`",
    "python ds_cmli/train.py --deepspeed_config ds_configs/zero2_muon.json": "tests/engine/test_muon.py: `tiny`",
    'python ds_cmli/train.py --set \'student.lora={"image": ["qkv", "attn.proj"], "text": ["query", "value"]}\'':
        "tests/models/test_lora.py: `tiny`",
    "python ds_cmli/train.py --preset ablation --set student.patch_keep=0.5": "tests/models/test_patch_keep.py: `tiny`",
    "python ds_cmli/train.py --losses global,cmli --set optim.negatives=queue:4096,tokens:256":
        "tests/losses/test_queue.py",
    "python ds_cmli/train.py --data pictures --set data.aspect_patch=14 --set 'student.image_overrides="
    "{\"use_naflex\": true}' --set 'teacher.overrides={\"use_naflex\": true}'":
        "tests/models/test_any_aspect.py: `tiny`",
    "deepspeed --num_accelerators 2 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json": "tests/test_train.py",
    "torchrun --nproc_per_node 2 ds_cmli/train.py": "tests/test_train.py: two steps of `tiny`",
    "sky jobs launch --name cmli clusters/sky.yaml": "tests/test_clusters.py: its schema, and what it runs",
    "kubectl apply -f clusters/trainjob.yaml": "tests/test_clusters.py: its schema, and what it runs",
    "torchrun --nproc_per_node 8 --max-restarts 3 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json "
    "--output-dir runs/cmli": "tests/faults/test_restarts.py: two ranks of `tiny`",
    "DS_CMLI_JOB=cmli torchrun --nnodes 1:4 --nproc_per_node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id cmli "
    "--rdzv-endpoint NODE:29400 ds_cmli/train.py --deepspeed_config ds_configs/zero2.json --output-dir runs/cmli":
        "tests/faults/test_restarts.py: two nodes of one rank",
    "python ds_cmli/train.py --profile-memory 2": "tests/memory/test_measure.py",
    "python ds_cmli/train.py --profile 5:8": "tests/memory/test_profiler.py",
    "deepspeed ds_cmli/train.py --data 'shards/{00000..00999}.tar'": "tests/data/sources/test_tars.py: few shards",
    "deepspeed ds_cmli/train.py --data 'cc12m/{00000..01242}.tar::0.7' --data coco/dataset_coco.json::0.3 --val-data "
    "coco/dataset_coco.json": "tests/data/sources/test_registry.py: a mixture of small sources",
    "deepspeed ds_cmli/train.py --preset paper --set student.image_model=convnext_tiny --set "
    "student.text_model=roberta-base --set data.tokenizer=roberta-base": "tests/models/test_encoders.py: small ones",
    "sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 slurm/train.sh --preset paper": "tests/slurm/test_layouts.py",
    "python -m ds_cmli.evaluate --checkpoint runs/demo-... --data demo": "tests/test_train.py: a run of `tiny`",
    "python -m ds_cmli.evaluate --checkpoint RUN --data coco/dataset_coco.json --split test --fold-size 1000":
        "tests/evaluate/test_command.py: small JSON",
    "python -m ds_cmli.evaluate --checkpoint RUN --zero-shot imagenet/val --class-names names.txt --templates "
    "prompts.txt": "tests/evaluate/test_command.py: few classes",
    "python -m ds_cmli.evaluate --checkpoint RUN --boxes Flickr30kEntities --image-root flickr30k-images --split test":
        "tests/evaluate/test_command.py: few boxes",
    "python -m ds_cmli.export RUN DIR": "tests/export/conftest.py: every test beside it",
    'ds-cmli-memory fits --gpu "A100 80GB" -- train_gpt.py --batch-size 8': "tests/fits/test_fits.py: a smaller loop",
    'ds-cmli-memory fits --world-size 8 --gpu "A100 80GB" -- train_fsdp.py': "tests/fits/test_fits.py: four ranks",
    'ds-cmli-memory fits --engine null --gpu "A100 80GB" -- train_gpt.py --batch-size 8':
        "tests/fits/test_null_gpu.py: a smaller loop",
    "python profiling/predict.py --preset paper --world-size 2": "tests/memory/test_predict.py: small models",
    "python profiling/predict.py --preset paper --world-size 2 --fit 24GB": "tests/memory/test_predict.py",
    "python profiling/predict.py --preset paper --sweep batch=128,256,world=1,2,8,stage=1,2,3":
        "tests/memory/test_predict.py",
    "python profiling/replay.py snapshot.pickle": "tests/allocator/test_history.py",
    "python profiling/compare_estimates.py": "tests/profiling/test_compare.py: small sizes",
    "python profiling/estimators.py --plot estimators.png": "tests/profiling/test_estimators.py: the first settings",
    "python profiling/benchmark_search.py --model RUN": "tests/profiling/test_benchmark_search.py: 80 pictures",
    "python profiling/benchmark_lengths.py --preset ablation": "tests/profiling/test_benchmark.py: `tiny`",
    "python profiling/benchmark_step.py": "tests/profiling/test_benchmark.py: `tiny`",
    "pip install -e '.[ablate,plots]'": "pyproject.toml: a part of what the tests need",
    "python profiling/ablate.py docs/learning/cut.toml --markdown table.md --plot differences.png":
        "tests/profiling/ablation/test_ablate.py: `tiny`",
    "python profiling/ablate.py docs/learning/plan.toml": "tests/profiling/ablation/test_ablate.py: a plan of `tiny`",
    "python profiling/ablate.py docs/learning/plan.toml --report --markdown docs/learning/results.md --plot "
    "docs/pictures/learning.png": "tests/profiling/ablation/test_report.py",
    "python profiling/ablate.py docs/learning/cut.toml --report --markdown docs/learning/cut.md":
        "tests/profiling/ablation/test_registered.py: its tables without intervals",
    "python profiling/ablate.py docs/learning/cut.toml --report --curve cut/kept kept.png":
        "tests/profiling/ablation/test_ablate.py",
    "python profiling/gpu_check.py": "tests/gpu/test_harness.py: what it runs; whole it needs a GPU",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    """Of all pages, the contents of the fenced blocks of a language; "": commands."""
    every = [pair for page in PAGES for pair in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text("utf-8"))]
    return [body for found, body in every if found == language]


def commands() -> set[str]:
    """Every line of a block without a language, without what stands behind a #."""
    return {line.split("  #")[0].strip() for body in blocks("") for line in body.splitlines() if line.strip()}


def test_every_command_is_run_or_has_its_reason():
    assert commands() == {*HERE, *ELSEWHERE}
    for reason in ELSEWHERE.values():
        assert (ROOT / reason.split(":")[0]).is_file(), reason


def test_links_lead_somewhere():
    """To a file of the repository, and to a heading in it."""
    for page in [*PAGES, ROOT / "slurm" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), (page.name, target)
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8")) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, (page.name, target)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the commands are run: RUN and PICTURES are there."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("reader")
    (folder / "RUN").mkdir()
    write_run(folder / "RUN")
    (folder / "RUN" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5, "loss/global": 2.0, "lr": 0.001}\n')
    (folder / "PICTURES").mkdir()
    for i in range(3):
        Image.fromarray(np.full((30, 40, 3), 80 * i, np.uint8)).save(folder / "PICTURES" / f"{i}.jpg")
    (folder / "ds_cmli").symlink_to(ROOT / "ds_cmli")
    return folder


@pytest.mark.parametrize("line", HERE)
def test_a_command_as_it_stands(line, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    program, *arguments = shlex.split(line)
    path, module = None, SCRIPTS.get(program)
    if arguments[0] == "-m":
        module, arguments = arguments[1], arguments[2:]
    elif program == "python":
        path, arguments = arguments[0], arguments[1:]
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts change it
    monkeypatch.setattr(cli, "leave", sys.exit)  # commands end their process at once
    monkeypatch.setattr(sys, "argv", [path or program, *arguments])
    with pytest.raises(SystemExit) as ended:
        if path:
            runpy.run_path(path, run_name="__main__")
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code, capfd.readouterr().err
    for name in (arguments[i + 1] for i, word in enumerate(arguments) if word in ("--output", "--page")):
        assert Path(name).stat().st_size > 1000


def test_python_of_inference(place, monkeypatch):
    (code,) = [body for body in blocks("python") if "ds_cmli.inference" in body]
    code = code.replace("runs/demo-20260101-000000", "RUN").replace("pictures/", "PICTURES/")
    monkeypatch.chdir(place)
    exec(compile(code, "docs/using.md", "exec"), {})


def test_python_of_exported_models_is_named():
    """tests/export runs it: DIR is a folder that a fresh process loads with and without trust.

    tests/cmli/test_recipes.py runs those of the all-pairs op.
    """
    assert len(blocks("python")) == 6
    (code,) = [body for body in blocks("python") if "AutoModel" in body]
    compile(code, "docs/using.md", "exec")
