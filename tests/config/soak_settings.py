"""Each setting in each of several runs: what a run leaves must differ with it, or a line must say that it does not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tests.config.fuzz import SETTINGS, Worker, write_data
from tests.config.soak import Counts

ACCUMULATING = ["--deepspeed_config", "JSON:accumulated"]
FROZEN = ["--set", "student.freeze_image=2", "--set", "student.freeze_text=2"]
# name: (what a run is beside the setting, which may make it idle; the sections whose settings are tried there)
CONTEXTS: dict[str, tuple[list[str], str]] = {
    "plain": ([], "student teacher data loss optim run"),
    "accumulated": (ACCUMULATING, "loss optim"),
    "demo": (["--data", "demo"], "data"),
    "micro-batch": (["--set", "optim.negatives=micro_batch", *ACCUMULATING], "optim"),
    "frozen": (FROZEN, "optim"),
    "cls_kd": (["--losses", "cls_kd"], "teacher loss optim"),
    "SGD": (["--deepspeed_config", "JSON:sgd"], "optim"),
    "other pairs held out": (["--val-data", "PAIRS:few"], "data"),
}
JSONS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": "auto"},
    "sgd": {"optimizer": {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}}},
}
VALUES: dict[str, list[Any]] = {
    **{name: values[:1] for name, values in SETTINGS.items()},
    "student.freeze_image": [1], "student.freeze_text": [1], "student.image_backbone": ["timm_tokens"],
    "student.text_backbone": ["causal"], "teacher.weights_partial": [True],
    "data.val_split": ["test"], "data.prefetch": [3], "data.augmentation": [{"horizontal_flip": 0.5}],
    "optim.lr_factors": [{"image": 0.5}], "optim.layer_decay": [0.5], "optim.cache_on_host": [True],
    "optim.reduce_once": [True], "run.compile": [], "optim.negatives": ["micro_batch"], "run.keep": [1],
    "run.patience": [2], "run.eval_every": [2, 9], "run.save_every": [1, 9], "run.log_every": [2, 9],
    "optim.betas": [[0.8, 0.9]], "run.match_maps": [1], "run.keep_best": [True], "data.max_pixels": [3600],
    "loss.cmli_backend": ["chunked"], "data.text_positions": [4], "optim.warmup_share": [0.5],
}  # fmt: skip
ACCUMULATED = {"accumulated"}  # where gradients are cached
PAIRS = {*CONTEXTS} - {"demo"}
OP = {*CONTEXTS} - {"cls_kd"}
# Settings whose effect is on memory, time, or faults that do not happen here: the contexts in which they have it.
UNSEEN: dict[str, set[str]] = {
    "data.workers": {*CONTEXTS}, "data.prefetch": set(), "data.max_bad_share": PAIRS, "data.max_pixels": PAIRS,
    "data.follow_symlinks": PAIRS, "loss.cmli_backend": OP, "loss.cmli_scratch_bytes": OP,
    "loss.cmli_recompute": OP - ACCUMULATED, "optim.cache_on_host": ACCUMULATED, "run.save_minutes": {*CONTEXTS},
    "run.keep": {*CONTEXTS}, "run.most_skipped": {*CONTEXTS}, "run.watchdog": {*CONTEXTS},
    "run.deterministic": {*CONTEXTS}, "run.eval_batch": {*CONTEXTS}, "student.image_backbone": {*CONTEXTS},
    "loss.duplicates": OP,
}  # fmt: skip
VOLATILE = ("pairs_per_s", "checkpoint_s", "time/", "tflops", "mfu", "memory")
SAID = re.compile(r"/tmp/\S+|\d\d:\d\d:\d\d[,.\d]*|[\d.]+ pairs/s.*|\d+m\d+s|in [\d.]+ s|[\d.]+ TFLOP.*")


def arguments(context: list[str], setting: str, value: Any, folder: Path) -> list[str]:
    given = {"--preset": "tiny", "--steps": "4", "--micro-batch": "4", "--data": str(folder / "pairs"),
             "--output-dir": str(folder / "run"), "--deepspeed_config": str(folder / "plain.json")}  # fmt: skip
    out: list[str] = []
    for word in context:
        if word.startswith("JSON:"):
            word = str(folder / f"{word[5:]}.json")
        out.append(str(folder / word[6:]) if word.startswith("PAIRS:") else word)
    defaults = [part for pair in given.items() if pair[0] not in out for part in pair]
    if setting == "optim.micro_batch":
        del defaults[(at := defaults.index("--micro-batch")) : at + 2]
    if setting == "run.patience":
        out += ["--eval-every", "2"]
    change = ["--set", f"{setting}={value if isinstance(value, str) else json.dumps(value)}"] if setting else []
    return [*defaults, *out, *change]


def outcome(answer: dict[str, Any], folder: Path) -> tuple[Any, set[str]]:
    """What a run has left, without times; and its lines."""
    run = folder / "run"
    lines = {SAID.sub("", line) for line in (answer["out"] + answer["err"]).splitlines()}
    lines = {line for line in lines if not line.startswith(("step ", "checkpoint ", "written ", "best ", "  "))}
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").open()] if (run / "metrics.jsonl").exists() else []
    kept = [{n: v for n, v in one.items() if not n.startswith(VOLATILE)} for one in numbers]
    files = {str(path.relative_to(run)) for path in run.rglob("*") if "events.out" not in path.name}
    weights = (run / "student.safetensors").read_bytes() if (run / "student.safetensors").exists() else b""
    events = sorted(path.stat().st_size // 2000 for path in run.rglob("events.out*"))
    shutil.rmtree(run, ignore_errors=True)
    return (kept, files, weights, events), lines


def setting_way(answer: dict[str, Any], plain: tuple[Any, set[str]], name: str, context: str, folder: Path) -> str:
    if answer["code"] not in (0, 2) or "Traceback" in answer["err"]:
        shutil.rmtree(folder / "run", ignore_errors=True)
        return "traceback"
    left, lines = outcome(answer, folder)
    if answer["code"] == 2:
        return "refused"
    if any("no effect" in line or "does not count" in line for line in lines - plain[1]):
        return "told"
    if left != plain[0] or context in UNSEEN.get(name, ()):
        return "effective"
    return "silent"


def soak_settings(folder: Path, contexts: list[str] | None = None) -> Counts:
    entry, worker = Counts("settings"), Worker()
    write_data(folder)
    for name, content in {"plain": {}, **JSONS}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for context, (words, sections) in CONTEXTS.items():
        if contexts is not None and context not in contexts:
            continue
        plains = {}
        for name, values in VALUES.items():
            own = any(word.startswith(f"{name}=") for word in words)
            if own or name.split(".")[0] not in sections.split():
                continue
            twin = name if name == "run.patience" else ""  # it needs evaluations, which the unchanged run then has too
            if twin not in plains:
                plains[twin] = outcome(worker(arguments(words, twin, 0, folder)), folder)
            for value in values:
                answer = worker(arguments(words, name, value, folder))
                entry.add(
                    f"{context}: {name} = {value!r:.60}", setting_way(answer, plains[twin], name, context, folder)
                )
        print(context, entry.line(), flush=True)
    worker.close()
    return entry
