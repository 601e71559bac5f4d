"""Random mistakes: `python -m tests.config.fuzz [--count 500] [--seed 0] [--only 12,34]`

Each case changes a DeepSpeed JSON or the options of train.py in one or two places, and goes through `--dry-run`; each
tenth is also trained, two steps. Two cases of three take values that are valid each for itself, the others any values.
Three things must hold, or the case is printed:
- no traceback: exit code 0, or 2 with one line;
- nothing is ignored in silence: the resolved configuration or a line differs from those of the unchanged command;
- `--dry-run` and the training end with the same exit code, and where that is 2 with the same line.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config import deepspeed_checks, optimizers, validation
from ds_cmli.config import deepspeed_keys as keys
from ds_cmli.config.options import PLACES
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LOSSES, Config
from tests.conftest import ROOT, clean_environment

VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 0.5, 1.0, 1e-3, 1e30, 2**40, 10**400, float("nan"), float("inf")),
    *("", "auto", "true", "1", "none", "cpu", "fp16", "bf16", "x" * 300, "\0", "..", [], [1], ["a"], {}, {"a": 1}),
]
TEXTS = ["{}", "[]", "null", "", "{", "[" * 3000, '{"fp16": {}, "fp16": {}}', '{"steps_per_print": ' + "9" * 5000 + "}"]
# What a key of the JSON may be, where its kind allows it; none of them lets a run diverge in two steps.
POOL = [
    *(None, True, False, 0, 1, 2, 3, 4, 8, 100, 1000, 5e7, 0.0, 1e-6, 1e-3, 0.05, 0.1, 0.5, 0.9, "auto"),
    *("fp32", "fp16", "bf16", "cpu", "none", "warning", "mean", "sum", "Warn", "log", "linear", "cos"),
    *("triangular", "cycle", [0.9, 0.95], [0.5, 1.2], [1e-6, 50], [1, 2], ["all_reduce"], ["norm"]),
]
# Valid settings of the preset `tiny`, none of which is its own.
_TOWER = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 14}
_TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SETTINGS: dict[str, list[Any]] = {
    "student.image_overrides": [_TOWER, {**_TOWER, "depth": 3}],
    "student.text_overrides": [_TEXT, {**_TEXT, "num_hidden_layers": 3}],
    "student.layers": [1],
    "student.shared_blocks": [2, 3],
    "student.embed_dim": [8, 24],
    "student.dropout": [0.1, 0.5],
    "student.weights_partial": [True],
    "teacher.overrides": [_TOWER],
    "teacher.block": [0, 1, -2],
    "data.image_size": [28, 42, 84],
    "data.text_positions": [8, 16, 48],
    "data.workers": [1, 2],
    "data.max_bad_share": [0, 0.5],
    "data.max_pixels": [3600, 10**6],
    "data.follow_symlinks": [True],
    "loss.weights": [{"cmli": 1}, {"global": 0.5, "cls_kd": 2}, {"global_sigmoid": 1, "cmli_sigmoid": 0.1}],
    "loss.mse_reduction": ["sum"],
    "loss.match": ["student"],
    "loss.start": [{"cmli": 2}],
    "teacher.average_blocks": [2],
    "loss.target": ["top", "attention"],
    "loss.init_temperature": [0.01, 0.5],
    "loss.init_bias": [-3.5, 0],
    "loss.cmli_init_temperature": [0.1, 1],
    "loss.cmli_backend": ["chunked", "triton"],
    "loss.cmli_recompute": [True],
    "loss.cmli_scratch_bytes": [2**20, 2**22],
    "loss.cmli_cut": [0.001, 0.5],
    "loss.cmli_exchange": ["gather", "ring"],
    "loss.cmli_gather_bytes": [2**10],
    "loss.cmli_token_keep": [0.25, 0.5],
    "student.patch_keep": [0.25, 0.5],
    "loss.duplicates": ["keep"],
    "optim.ema_decay": [0.5, 0.999],
    "optim.negatives": ["micro_batch"],
    "run.keep_best": [True],
    "run.patience": [1],
    "run.match_maps": [0, 2],
    "optim.lr": [1e-5, 0.01],
    "optim.betas": [[0.8, 0.9]],
    "optim.eps": [1e-8],
    "optim.weight_decay": [0, 0.1],
    "optim.warmup_share": [0, 0.5],
    "optim.grad_clip": [0, 0.5],
    "optim.micro_batch": [2, 8],
    "run.seed": [1, 2**31 - 1],
    "run.log_every": [2, 3],
    "run.eval_every": [1, 2],
    "run.eval_batch": [3, 20],
    "run.save_every": [1, 2],
    "run.save_minutes": [0, 0.001],
    "run.keep": [1, 5],
    "run.most_skipped": [0, 1],
    "run.deterministic": [True],
    "run.watchdog": [0, 60],
}


@dataclass
class Case:
    number: int
    json_text: str  # of the DeepSpeed JSON
    like: str = ""  # the shipped JSON that it was made of
    valid: bool = False  # whether each value is valid for itself
    changed: bool = True  # not where one change undoes the other
    options: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)  # in words


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every key of nested objects."""
    results = []
    for key, item in value.items() if isinstance(value, dict) else ():
        results += [(*path, key), *_places(item, (*path, key))]
    return results


def change_json(draw: random.Random, content: dict[str, Any]) -> str:
    """Change one place; what was done."""
    kinds = ["value", "value", "key", "remove", "typo", "dotted", "stage", "optimizer", "scheduler", "optimizer key"]
    kind = draw.choice(kinds)
    path = draw.choice(_places(content))
    *parents, key = path
    inside = content
    for parent in parents:
        inside = inside[parent]
    name = ".".join(path)
    if kind == "value":
        inside[key] = draw.choice(VALUES)
        return f"{name} = {inside[key]!r:.40}"
    if kind == "remove":
        del inside[key]
        return f"without {name}"
    if kind == "dotted":
        new = name if parents else draw.choice(["", " ", f"{key} ", key.upper(), f"{key}.enabled"])
        content[new] = inside.pop(key)
        return f"{name} as {new!r}"
    if kind == "typo":
        at = draw.randrange(len(key))
        inside[key[:at] + key[at + 1 :] + draw.choice("xyz_")] = inside.pop(key)
        return f"typo in {name}"
    if kind == "stage":
        content["zero_optimization"] = {"stage": draw.choice([0, 1, 2, 3])}
        return f"zero_optimization = {content['zero_optimization']}"
    if kind == "key":
        section = draw.choice([s for s in keys.sections() if s and "." not in s] + [""] * 3)
        at = content if not section else content.setdefault(section, {})
        if not isinstance(at, dict):
            at = content[section] = {}
        new = draw.choice([*keys.sections()[section]] or ["enabled"])
        if draw.random() < 0.5 and "enabled" in keys.sections()[section]:
            at["enabled"] = True
        at[new] = draw.choice(VALUES)
        return f"{section}.{new} = {at[new]!r:.40}"
    table = optimizers.SCHEDULERS if kind == "scheduler" else optimizers.OPTIMIZERS
    if kind == "optimizer key" and isinstance(content.get("optimizer"), dict):
        optimizer = content["optimizer"]
        optimizer["params"] = dict(optimizer["params"]) if isinstance(optimizer.get("params"), dict) else {}
        entry = optimizers.OPTIMIZERS.get(str(optimizer.get("type")), optimizers.OptimizerEntry("", ("lr",)))
        new = draw.choice(entry.takes or ("lr",))
        optimizer["params"][new] = draw.choice(VALUES)
        return f"optimizer.params.{new} = {optimizer['params'][new]!r:.40}"
    kind = kind.split()[0]
    content[kind] = {"type": draw.choice([*table, *optimizers.OPTIMIZERS, "LambdaLR", "Adamm"])}
    entry = table.get(content[kind]["type"])
    known = entry.takes if entry else ("lr",)
    if draw.random() < 0.7 and known:
        content[kind]["params"] = {draw.choice(known): draw.choice([0.1, 1, 10, 0, -1, "auto", True, [0.5, 0.9]])}
    return f"{kind} = {content[kind]}"


def _valid(draw: random.Random, kind: validation.PydanticType, where: str, folder: Path) -> Any:
    """A value that this kind allows, or None, which may be one, too."""
    if kind in (str, str | None):
        return str(folder / "logs")
    values = []
    for value in POOL:
        with contextlib.suppress(UserError):
            values.append(deepspeed_checks._value(where, value, kind))
    return draw.choice(values or [None])


def change_json_validly(draw: random.Random, content: dict[str, Any], folder: Path) -> str:
    """Change one place to a valid value; what was done."""
    kind = draw.choice(["key"] * 5 + ["stage", "precision", "batch", "optimizer", "scheduler", "remove"])
    if kind == "stage":
        present = content.get("zero_optimization", {}).get("stage", 0)
        stage = draw.choice([s for s in range(4) if s != present])
        content["zero_optimization"] = draw.choice([{}, content.get("zero_optimization", {})]) | {"stage": stage}
        return f"zero_optimization.stage = {stage}"
    if kind == "precision":
        for name in ("fp16", "bf16", "torch_autocast"):
            content.pop(name, None)
        new = draw.choice(["fp32", "fp16", "bf16", "torch_autocast"])
        more = {"dtype": draw.choice(["bf16", "float16"])} if new == "torch_autocast" else {}
        content |= {new: {"enabled": draw.choice([True, True, "auto"] if not more else [True]), **more}}
        if new == "fp32":
            del content[new]
        return f"precision {new}: {content.get(new)}"
    if kind == "batch":
        micro, steps = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3])
        new = dict(zip(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"),
                       (micro, steps, micro * steps), strict=True))  # fmt: skip
        new = {key: new[key] if draw.random() < 0.7 else "auto" for key in new}
        content |= new
        return f"{new}"
    if kind == "remove":
        optional = [k for k in content if k not in ("zero_optimization", "train_batch_size")]
        del content[key := draw.choice(optional or [*content])]
        return f"without {key}"
    if kind in ("optimizer", "scheduler"):
        table = optimizers.SCHEDULERS if kind == "scheduler" else optimizers.OPTIMIZERS
        new = draw.choice([name for name, entry in table.items() if not entry.why_not])
        takes = table[new].takes
        params = {}
        for name in (*table[new].required, *draw.sample(takes, min(len(takes), draw.choice([0, 1, 2])))):
            allowed = optimizers.PARAMETERS.get(name, optimizers.PARAMETER)
            params[name] = 1e-3 if name.endswith("lr") else _valid(draw, allowed, f"{kind}.params.{name}", folder)
        content[kind] = {"type": new, "params": params}
        if kind == "optimizer" and not table[new].zero_tested:
            content["zero_allow_untested_optimizer"] = True
        return f"{kind} = {content[kind]}"
    places = [(s, k) for s, known in keys.sections().items() for k in known if s not in ("optimizer", "scheduler")]
    section, key = draw.choice(places)
    at = content
    for part in section.split(".") if section else ():
        at = at.setdefault(part, {})
    if "enabled" in keys.sections()[section]:
        at["enabled"] = True
    where = f"{section}.{key}".lstrip(".")
    at[key] = _valid(draw, keys.sections()[section][key], where, folder)
    return f"{where} = {at[key]!r:.40}"


def change_options_validly(draw: random.Random) -> list[str]:
    name = draw.choice([*SETTINGS])
    value = draw.choice(SETTINGS[name])
    return ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]


def change_options(draw: random.Random, folder: Path) -> list[str]:
    kind = draw.choice(["set", "set", "set", "option", "losses", "profile", "data", "output", "resume", "twice"])
    settings = [
        f"{s.name}.{f.name}"
        for s in dataclasses.fields(Config)
        for f in dataclasses.fields(s.default_factory)  # type: ignore[arg-type]
    ]
    if kind in ("set", "twice"):
        name = draw.choice([*settings, "student.layer", "modle.layers", "optim", "loss.weights.cmli"])
        values = [*VALUES, 16, 4, 0.02, "random", "hub", "demo", "builtin", "student", "sum", "triton", "chunked"]
        values += [{"cmli": 1}, {"cmli": "a"}, {"hidden_size": 48}, {"num_heads": 3}, {"typo": 1}, [0.9, 0.95]]
        value = draw.choice(values)
        text = value if isinstance(value, str) else json.dumps(value)
        out = ["--set", f"{name}={text}"]
        if kind == "twice":
            out += draw.choice([out, ["--lr", "0.5"], ["--set", f"{name}=3"], ["--seed", "5"], ["--init", "random"]])
        return [part.replace("\0", "") for part in out]
    if kind == "option":
        option = draw.choice([o for o in PLACES if o not in ("deterministic", "losses", "data", "output_dir", "steps")])
        value = draw.choice(["0", "1", "2", "-1", "1e30", "nan", "inf", "", "many", "0.5", "9" * 5000])
        return [f"--{option.replace('_', '-')}", value]
    if kind == "losses":
        weights = ["", "", "=0.5", "=-1", "=0", "=nan", "=x", "="]
        parts = (draw.choice([*LOSSES, "clmi", ""]) + draw.choice(weights) for _ in range(draw.choice([1, 2, 3])))
        return ["--losses", ",".join(parts)]
    if kind == "profile":
        value = draw.choice(["1:2", "2:1", "1", "0:1", "1:9", "a:b", ""])
        return draw.choice([["--profile", value], ["--profile-memory", draw.choice(["0", "1", "2", "3", "x"])]])
    if kind == "data":
        return ["--data", str(folder / draw.choice(["nowhere", "empty", "broken", "few", "file", "captions", ""]))]
    if kind == "output":
        return [
            "--output-dir",
            draw.choice([str(folder / "file" / "run"), "/proc/run", str(folder / "file"), "x" * 300]),
        ]
    return ["--resume", draw.choice(["never", str(folder), "/nowhere", "", str(folder / "file")])]


def _explicit(content: dict[str, Any]) -> dict[str, Any]:
    """With DeepSpeed's defaults of fp16, which ask for nothing where they are given."""
    fp16 = content.get("fp16")
    defaults = keys.models()["fp16"]().model_dump(exclude={"enabled"})
    return content | {"fp16": defaults | fp16} if isinstance(fp16, dict) else content


def _is_the_presets(option: str) -> bool:
    """Whether it is the argument of a `--set` that gives a setting the value which it has in the preset."""
    name, _, value = option.partition("=")
    section, _, field = name.partition(".")
    return str(getattr(getattr(load_preset("tiny", {}), section, None), field, None)) == value


def cases(count: int, seed: int, folder: Path) -> list[Case]:
    shipped = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}
    out = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        case = Case(number, "", draw.choice([*shipped]), valid=draw.random() < 2 / 3)
        content = copy.deepcopy(shipped[case.like])
        for _ in range(draw.choice([1, 1, 2])):
            in_json = draw.random() < 0.55 and content
            if case.valid and in_json:
                case.changes.append(change_json_validly(draw, content, folder))
            elif in_json:
                case.changes.append(change_json(draw, content))
            else:
                case.options += change_options_validly(draw) if case.valid else change_options(draw, folder)
        case.json_text = json.dumps(content)
        options = [option for option in case.options if option != "--set" and not _is_the_presets(option)]
        case.changed = bool(options) or _explicit(content) != _explicit(shipped[case.like])
        if not case.valid and draw.random() < 0.1:
            case.json_text = draw.choice(TEXTS)
            case.changes = [f"the JSON is {case.json_text[:30]!r}"]
        case.changes += [f"{option:.60}" for option in case.options]
        out.append(case)
    return out


def write_data(folder: Path) -> None:
    for name, count in (("pairs", 40), ("few", 3), ("broken", 40), ("captions", 40), ("empty", 0)):
        (folder / name).mkdir(parents=True)
        with (folder / name / "metadata.jsonl").open("w") if count else contextlib.nullcontext(io.StringIO()) as file:
            for i in range(count):
                picture = Image.new("RGB", (60, 60), (5 * i, 200, 0))
                picture.paste((0, 0, 200), (0, 0, 20, 60))
                picture.save(folder / name / f"{i}.png")
                if name == "broken":
                    (folder / name / f"{i}.png").write_bytes(b"no picture")
                text = " " if name == "captions" else f"a red square {i}"
                file.write(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    (folder / "file").write_text("")


def _arguments(case: Case, folder: Path) -> list[str]:
    """The command line: the preset `tiny` on few pairs, two steps, and the case's options, which come last."""
    path = folder / "ds.json"
    path.write_text(case.json_text)
    defaults = {"--preset": "tiny", "--steps": "2", "--micro-batch": "4", "--deepspeed_config": str(path)}
    defaults |= {"--data": str(folder / "pairs"), "--output-dir": str(folder / "run")}
    kept = {name: value for name, value in defaults.items() if name not in case.options}
    return [*(part for pair in kept.items() for part in pair), *case.options]


class Worker:
    """A process that runs commands one after the other; a new one where it has ended."""

    def __init__(self):
        self.process = None

    def __call__(self, arguments: list[str]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            env = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.config.fuzz", "--worker"], cwd=ROOT, env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"code": self.process.wait(), "out": "", "err": "", "ended": True}

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


def work() -> None:
    """Answer each line of arguments by a line with the exit code and what was printed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from ds_cmli import train
    from ds_cmli.common.cli import exit_code
    from ds_cmli.memory import predict_subprocess

    class One(predict_subprocess.Predictor):
        """One process for all predictions, of this device's kind alone."""

        def send(self, request):
            self.asked = getattr(self, "asked", [])
            self.asked.append(request.target)
            if request.target == "cpu":
                super().send(request)

        def receive(self):
            return (
                super().receive()
                if self.asked.pop(0) == "cpu"
                else predict_subprocess.PredictionAnswer(None, "not asked")
            )

    def one(*_):
        if not predictors or predictors[0].process.poll() is not None:
            predictors[:] = [One(3600)]
        return contextlib.nullcontext(predictors[0])

    predictors: list[One] = []
    for line in sys.stdin:
        out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
        with (
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            mock.patch.object(predict_subprocess, "Predictor", one),
            mock.patch.object(sys, "argv", ["train.py", *json.loads(line)]),
        ):  # fmt: skip
            try:
                code = exit_code(train.command)
            except BaseException:
                code = 1
                traceback.print_exc()
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()
    for predictor in predictors:
        predictor.close()


def _told(answer: dict[str, Any]) -> str:
    """What was printed, without what differs between two equal commands."""
    text = re.sub(r"/tmp/\S+", "FOLDER", answer["out"] + answer["err"])
    return re.sub(r"\d\d:\d\d:\d\d[,.\d]*", "TIME", text)


def _line(answer: dict[str, Any]) -> str | None:
    lines = [line for line in answer["err"].splitlines() if line.startswith("error: ")]
    return lines[0] if len(lines) == 1 else None


def judge(case: Case, dry: dict[str, Any], plain: str, real: dict[str, Any] | None) -> list[str]:
    """What does not hold."""
    wrong = []
    for name, answer in (("dry run", dry), ("run", real)):
        if answer is None:
            continue
        if answer["code"] not in (0, 2) or "Traceback" in answer["err"]:
            wrong.append(f"{name} ends with {answer['code']}: {answer['err'].strip().splitlines()[-1:]}")
        elif answer["code"] == 2 and _line(answer) is None:
            wrong.append(f"{name} has no one line: {answer['err'][-300:]!r}")
    if dry["code"] == 0 and case.changed and _told(dry) == plain:
        wrong.append("ignored in silence")
    if real is not None and (dry["code"], _line(dry)) != (real["code"], _line(real)):
        wrong.append(f"dry run {dry['code']} {_line(dry)}, run {real['code']} {_line(real)}")
    return wrong


def fuzz(
    count: int, seed: int, first: int = 0, trained: int = 10, only: set[int] | None = None, say=print
) -> tuple[Counter, list[str]]:
    """Figures, and the cases of which something does not hold; every `trained`-th case is trained, too."""
    figures: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, worker, plain = Path(name), Worker(), {}
        write_data(folder)
        for case in cases(first + count, seed, folder)[first:]:
            if only is not None and case.number not in only:
                continue
            dry = worker([*_arguments(case, folder), "--dry-run"])
            if dry["code"] == 0 and case.like not in plain:
                unchanged = Case(0, (ROOT / "ds_configs" / case.like).read_text())
                plain[case.like] = _told(worker([*_arguments(unchanged, folder), "--dry-run"]))
            real = None
            if case.number % trained == 0 or only is not None:
                real = worker(_arguments(case, folder))
            wrong = judge(case, dry, plain.get(case.like, ""), real)
            figures["cases"] += 1
            figures["refused" if dry["code"] == 2 else "accepted"] += 1
            figures["valid one by one"] += case.valid
            figures["of these refused"] += case.valid and dry["code"] == 2
            figures["trained"] += real is not None and real["code"] == 0
            figures["compared"] += real is not None
            for part in wrong:
                failures.append(f"case {case.number}: {'; '.join(case.changes)}: {part}")
                print(failures[-1])
            shutil.rmtree(folder / "run", ignore_errors=True)
            if figures["cases"] % 25 == 0:
                print(dict(figures), flush=True)
            if only is not None:
                print(
                    json.dumps(
                        {"changes": case.changes, "dry": dry["err"][-1500:], "real": (real or dry)["err"][-1500:]},
                        indent=1,
                    )
                )
        worker.close()
    return figures, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Case to begin with.")
    parser.add_argument("--only", type=lambda text: {int(n) for n in text.split(",")})
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    started = time.monotonic()
    figures, failures = fuzz(options.count, options.seed, options.first, only=options.only)
    shares = ", ".join(f"{name} {n} ({n / max(1, figures['cases']):.0%})" for name, n in figures.items())
    print(f"seed {options.seed}: {shares}; {len(failures)} failures, {time.monotonic() - started:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
