"""What a user can do wrong, and the one line each mistake gets: on stderr, exit code 2, no traceback."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ds_cmli import train
from ds_cmli.common.cli import exit_code
from ds_cmli.distributed.launchers import OF_A_RANK
from ds_cmli.evaluate import __main__ as evaluate
from tests.conftest import ROOT, clean_environment, rank_environments
from tests.processes import Program


def pairs(folder, count=24, text="a red square", broken=0, column="text"):
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as f:
        for i in range(count):
            name = f"{i}.png"
            Image.new("RGB", (60, 60), (200, 10 * i % 255, 0)).save(folder / name)
            if i < broken:
                (folder / name).write_bytes(b"not a picture")
            f.write(json.dumps({"file_name": name, column: f"{text} {i}"}) + "\n")
    return str(folder)


def json_file(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return ["--deepspeed_config", str(path)]


def wrong_weights(tmp_path):
    save_file({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "w.safetensors")
    return [f"--set=student.image_weights={tmp_path / 'w.safetensors'}"]


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return ["--output-dir", str(tmp_path / "file" / "run")]


# name: (arguments, what the line must say)
MISTAKES = {
    "unknown preset": (["--preset", "dmeo"], "--preset is 'dmeo': did you mean 'demo'?"),
    "unknown option": (["--stpes", "3"], "No such option '--stpes'"),
    "negative steps": (["--steps", "-3"], "--steps is -3: Input should be"),
    "steps not a number": (["--steps", "many"], "'many' is not a valid integer"),
    "steps and epochs": (["--steps", "3", "--epochs", "1"], "optim.steps is 3 and optim.epochs is 1.0: give one"),
    "unknown loss": (["--losses", "global,clmi"], "'clmi': 1.0}: did you mean 'cmli'?"),
    "no loss": (["--losses", ""], "--losses is {}: Dictionary should have at least 1 item"),
    "loss weight": (["--losses", "cmli=big"], "--losses has 'cmli=big': write NAME or NAME=WEIGHT"),
    "more patches than there are": (
        ["--set", "loss.target=top", "--set", "loss.target_top=17"],
        "loss.target_top is 17: an image has 16 patches: give fewer",
    ),
    "more blocks than there are": (
        ["--set", "teacher.average_blocks=3"],
        "teacher.average_blocks is 3: 'vit_tiny_patch16_224' has 2 up to teacher.block: give fewer",
    ),
    "unknown setting": (["--set", "student.layres=2"], "setting of student is 'layres': did you mean 'layers'?"),
    "setting without value": (["--set", "student.layers"], "write SECTION.SETTING=VALUE"),
    "setting of a wrong type": (
        ["--set", "student.layers=two"],
        "layers is 'two': Input should be a valid integer",
    ),
    "too many layers": (["--set", "student.layers=9"], "student.layers is 9: student.image_model"),
    "teacher block": (["--set", "teacher.block=5"], "teacher.block is 5: 'vit_tiny_patch16_224' has blocks 0 to 1"),
    "unknown image model": (["--set", "student.image_model=vit_tinny"], "student.image_weights is 'random', the model"),
    "model without class token": (["--set", "teacher.model=resnet18", "--set", "teacher.overrides={}"], "resnet18"),
    "missing weights": (["--set", "teacher.weights=nowhere.pt"], "teacher.weights is 'nowhere.pt': no such file"),
    "weights of the wrong shape": (wrong_weights, "w.safetensors', the model 'vit_tiny_patch16_224' with"),
    "unknown tokenizer": (["--set", "data.tokenizer=/nowhere"], "data.tokenizer is '/nowhere'"),
    "no JSON": (
        ["--deepspeed_config", "ds_configs/zero9.json"],
        "no such file; the folder has: zero1.json, zero2.json",
    ),
    "broken JSON": (lambda p: json_file(p, '{"fp16": '), "not valid JSON"),
    "JSON twice": (lambda p: json_file(p, '{"fp16": {}, "fp16": {}}'), "has 'fp16' twice"),
    "profile that cannot be written": (
        lambda p: json_file(p, {"flops_profiler": {"enabled": True, "output_file": "/proc/none/x"}}),
        "flops_profiler.output_file is '/proc/none/x': cannot write there: No such file",
    ),
    "option twice": (["--steps", "3", "--steps=5"], "--steps is given 2 times: keep one"),
    "no data folder": (["--data", "/nowhere"], "/nowhere"),
    "no metadata": (lambda p: ["--data", str(p)], "metadata.jsonl"),
    "missing caption column": (lambda p: ["--data", pairs(p / "d", column="captoin")], "captoin"),
    "unreadable images": (
        lambda p: ["--data", pairs(p / "d", count=200, broken=20), "--micro-batch", "16"],
        "data.max_bad_share = 0.01",
    ),
    "empty captions": (lambda p: ["--data", empty_captions(p / "d")], "data.max_bad_share = 0.01"),
    "too few pairs": (lambda p: ["--data", pairs(p / "d", count=5)], "fewer than one global batch of 8"),
    "output folder": (a_file, "cannot write there"),
    "trace beyond the end": (["--profile", "30:31"], "--profile is '30:31': give some of the steps 1 to 20"),
    "trace of no step": (["--profile", "0:1"], "--profile is '0:1': give the first and the last step"),
    "memory of no step": (["--profile-memory", "0"], "--profile-memory is 0: give 1 to 20"),
    "both profiles": (["--profile", "1:2", "--profile-memory", "1"], "both take the profiler, give one"),
    "nothing to resume": (lambda p: ["--resume", str(p)], "no checkpoint there; give a run's output folder"),
    "heads": (
        ["--set", 'student.image_overrides={"embed_dim": 33, "depth": 2, "num_heads": 2, "patch_size": 14}'],
        "student.image_weights is 'random'",
    ),
    "text heads": (
        ["--set", 'student.text_overrides={"hidden_size": 33, "num_attention_heads": 2}'],
        "student.text_weights is 'random'",
    ),
}


def empty_captions(folder):
    pairs(folder)
    lines = [json.dumps({"file_name": f"{i}.png", "text": " " if i % 2 else "red"}) for i in range(24)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def fail(command, arguments, monkeypatch, capsys) -> str:
    """The line on stderr of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    code = exit_code(command)
    error = capsys.readouterr().err
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_training_mistakes(name, tmp_path, monkeypatch, capsys):
    arguments, words = MISTAKES[name]
    if callable(arguments):
        arguments = arguments(tmp_path)
    given = {"--preset": "tiny", "--output-dir": str(tmp_path / "run")}
    defaults = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    line = fail(train.command, [*defaults, *arguments], monkeypatch, capsys)
    assert words in line
    print(f"{name}: {line}")


def test_evaluation_mistakes(tmp_path, monkeypatch, capsys):
    line = fail(evaluate.command, ["--checkpoint", str(tmp_path)], monkeypatch, capsys)
    assert f"--checkpoint is {str(tmp_path)!r}: no config.json there" in line
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--checkpoint", str(tmp_path), "--json", str(tmp_path / "nowhere" / "found.json")]
    assert "found.json': No such file or directory" in fail(evaluate.command, arguments, monkeypatch, capsys)
    line = fail(evaluate.command, [], monkeypatch, capsys)
    assert "MODEL or --checkpoint: none is given" in line


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("ds_cmli/train.py", ["--deepspeed_config", "/nowhere.json"]),
        ("ds_cmli/evaluate", ["--checkpoint", "/nowhere"]),
        ("profiling/predict.py", ["--deepspeed_config", "/nowhere.json"]),
        ("profiling/compare_estimates.py", ["--preset", "demmo"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_libraries_are_imported_that_take_seconds(script, arguments):
    lines = ["import atexit, runpy, sys", f"sys.argv = {[script, *arguments]!r}"]
    lines.append(f"sys.path[0] = {str((ROOT / script).parent)!r}")  # as for a script that is run by its path
    lines.append("atexit.register(lambda: print('imported', 'deepspeed' in sys.modules, 'timm' in sys.modules))")
    lines.append(f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "imported False False" in done.stdout


def two_ranks(folders, arguments) -> list[tuple[int, str]]:
    """Exit code and standard error of each of two ranks, started in its own folder with its own arguments."""
    ranks = []
    for folder, own, env in zip(folders, arguments, rank_environments(2), strict=True):
        command = [str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", *own]
        errors = folder / f"errors-{len(ranks)}"
        ranks.append((Program(command, env, folder, errors.with_suffix(".out"), errors), errors))
    return [(program.wait(120), errors.read_text()) for program, errors in ranks]


def test_a_mistake_of_one_rank_alone_is_told(tmp_path):
    run, own = ["--output-dir", str(tmp_path / "run")], ["--data", pairs(tmp_path / "pairs")]
    (code, error), (other_code, other_error) = two_ranks(
        [tmp_path] * 2, [[*run, *own], [*run, "--data", str(tmp_path / "nowhere")]]
    )
    assert (code, other_code) == (2, 2), (error, other_error)
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1: ") and str(tmp_path / "nowhere") in line
    assert "Traceback" not in error + other_error


def test_an_output_folder_that_the_ranks_do_not_share(tmp_path):
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    data = pairs(tmp_path / "pairs")
    result = two_ranks(folders, [["--data", data, "--output-dir", "run"]] * 2)
    assert [code for code, _ in result] == [2, 2], result
    assert "error: --output-dir is 'run': rank 1 does not see what rank 0 writes there" in result[0][1]
    assert "Traceback" not in result[0][1] + result[1][1]
