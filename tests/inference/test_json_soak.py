"""Every JSON that the package reads, damaged in every way: it is read or refused in one line, and nothing else."""

import io
import json
import random
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_cmli.allocator import snapshot
from ds_cmli.allocator.history import replay_history
from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.lock import Lock
from ds_cmli.checkpoint.run_folder import requeued
from ds_cmli.checkpoint.train_state import TrainState, read_shared
from ds_cmli.common import tensor_file
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.data.bad import BadFile
from ds_cmli.data.tokens import builtin_tokenizer, load_tokenizer
from ds_cmli.evaluate.zero_shot import class_names
from ds_cmli.export import card
from ds_cmli.export import folder as exports
from ds_cmli.inference import Index, Model
from ds_cmli.report import charts
from ds_cmli.report.__main__ import write
from ds_cmli.report.runs import read_all
from tests.allocator.random_programs import recorded
from tests.conftest import ROOT

DEEP = json.loads("[" * 60 + "]" * 60)
VALUES = [None, True, -5, 0, 1.5, 10**12, 10**299, 1e308, "x", "", "\ud800", [], [[1]], {}, {"a": 1}, DEEP]
WHOLE = [
    b"", b"{", b"[]", b"null", b"7", b'"a"', b"\xff\xfe", b'{"a": 1, "a": 2}', b"9" * 400, b"9" * 5000,
    b'"\xed\xa0\x80"',
    b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"a": ' * 10_000 + b"1" + b"}" * 10_000, b"\0" * 100,
]  # fmt: skip
LEAVES = 20  # of a file, that are replaced by each value
SLOW = 3  # where a model is loaded for each damage
failures: list[str] = []


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(content: object, path: tuple, value: object) -> object:
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def damages(text: bytes, draw: random.Random, leaves: int = LEAVES) -> Iterator[bytes]:
    """The text with other values, without keys, cut off, with flipped bits, and what is no object of it at all."""
    yield from WHOLE
    content = json.loads(text)
    every = list(places(content))
    for path in draw.sample(every, min(leaves, len(every))):
        for value in VALUES:
            yield json.dumps(replaced(content, path, value)).encode()
        if isinstance(path[-1], str):
            yield json.dumps(replaced(content, path[:-1], {}) if path[1:] else {}).encode()
    for _ in range(leaves):
        place = draw.randrange(len(text))
        yield text[:place]
        yield text[:place] + bytes([text[place] ^ (1 << draw.randrange(8))]) + text[place + 1 :]


def tried(use: Callable[[], object], result: Counter, name: str, damage: bytes) -> None:
    try:
        use()
        result["read"] += 1
    except UserError as error:
        text = str(error)
        fine = text and "\n" not in text and len(text) < 2000
        result["refused" if fine else "FAILED"] += 1
        if not fine:
            failures.append(f"{name}: {damage[:200]!r}: {error!r:.300}")
    except BaseException as error:
        result["FAILED"] += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        failures.append(f"{name}: {damage[:200]!r}: {error!r:.300} in {where.filename}:{where.lineno}")


def campaign(file: Path, use: Callable[[], object], line: int | None = None, leaves: int = LEAVES) -> Counter:
    """What came of each damage of a file, or of one line of it."""
    whole, result = file.read_bytes(), Counter()
    lines = whole.split(b"\n")
    try:
        for damage in damages(whole if line is None else lines[line], random.Random(file.name), leaves):
            if line is not None:
                damage = b"\n".join([*lines[:line], damage.replace(b"\n", b" "), *lines[line + 1 :]])
            file.write_bytes(damage)
            tried(use, result, str(file), damage)
    finally:
        file.write_bytes(whole)
    print(f"{file.name}: {dict(result)}", flush=True)
    return result


@pytest.mark.soak
def test_every_json_damaged(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    total = {}
    lines = [
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 2, "eval/seen/pairs": 4, "eval/seen/cmli/i2t_r1": 0.5, "eval/seen/left_out_first": ["a"], "loss": 1.0},
    ]
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"categories": {"data": 1}, "totals": {"requested": 5}}
    (run / "memory.json").write_text(json.dumps({"prediction": figures, "measurement": figures}))

    def report() -> None:
        write(read_all([str(run)]), tmp_path / "page.html")

    drawn, draw = Counter(), charts.draw

    def one_in_thirty(chart: charts.Chart) -> str:  # each takes a second
        drawn["charts"] += 1
        return draw(chart) if drawn["charts"] % 30 == 0 else ""

    monkeypatch.setattr(charts, "draw", one_in_thirty)
    total["metrics.jsonl, report"] = campaign(metrics, report, line=1)
    source = card.ExportedRun(run, exports.load_run(run, None, False).config, False)

    def recorded_results() -> None:
        results = card.recorded(source)
        if results:
            print(results.table(), results.lines(), results.names(), file=io.StringIO())

    total["metrics.jsonl, card"] = campaign(metrics, recorded_results, line=1)
    total["memory.json, report"] = campaign(run / "memory.json", report)
    total["config.json, report"] = campaign(run / "config.json", report)
    total["config.json, load_config"] = campaign(
        run / "config.json", lambda: exports.load_run(run, None, False), leaves=SLOW
    )
    (run / "checkpoint" / "step2").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    total["config.json, requeued"] = campaign(run / "config.json", lambda: requeued("never", run))

    state = {**TrainState().shared(), "best": {"metric": "m", "value": 1.0, "step": 1}, "step": 2}
    state["sampler"] = {"epoch": 0, "position": 3, "length": 9, "seed": 0, "window": 0, "global_batch": 8}
    step = run / "checkpoint" / "step2"
    (step / "state.json").write_text(json.dumps(state))
    total["state.json"] = campaign(step / "state.json", lambda: read_shared(step))
    (step / "checksums.json").write_text(json.dumps({"state.json": {"bytes": 3, "sha256": "a"}}))
    total["checksums.json"] = campaign(step / "checksums.json", lambda: files.problem(step))
    lock = run / "run.lock"
    lock.write_text(json.dumps({**Lock(run).mine, "place": "elsewhere"}))
    total["run.lock"] = campaign(lock, lambda: Lock(run)._lives(lock.read_text(errors="replace"), 1.0))
    (run / "bad.jsonl").write_text('{"name": "a", "reason": "b", "when": "training"}\n')
    total["bad.jsonl"] = campaign(run / "bad.jsonl", lambda: BadFile(run / "bad.jsonl", []), line=0)

    index = Index.build(tmp_path / "index", Model.load(run, "cpu"), pictures, str(run), batch_size=5)[0]
    total["index.json"] = campaign(index.folder / "index.json", lambda: Index(index.folder))
    exported = tmp_path / "exported"
    exported.mkdir()
    exports.write_model(exported, exports.load_run(run, None, False))
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "processor_config.json"):
        if (exported / name).exists():
            total[f"exported {name}"] = campaign(exported / name, lambda: Model.load(exported, "cpu"), leaves=SLOW)
    student = run / "student.safetensors"
    data = student.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    result = Counter()
    for header in damages(data[8 : 8 + size], random.Random(0), SLOW):
        student.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
        tried(lambda: (tensor_file.damage(student), Model.load(run, "cpu")), result, "header", header)
    student.write_bytes(data)
    total["safetensors header"] = result

    for name in ("zero2", "zero2_muon", "zero3"):
        path = tmp_path / f"{name}.json"
        path.write_bytes((ROOT / "ds_configs" / path.name).read_bytes())
        total[f"DeepSpeed {name}"] = campaign(path, lambda path=path: DeepSpeedConfig.load(path))
    builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "tokenizer" / name
        total[f"tokenizer {name}"] = campaign(
            path, lambda: load_tokenizer(str(tmp_path / "tokenizer"), 16)("a dog"), leaves=SLOW
        )
    (tmp_path / "names.json").write_text(json.dumps({"a": "x", "b": "y"}))
    total["--class-names"] = campaign(
        tmp_path / "names.json", lambda: class_names(["a", "b"], str(tmp_path / "names.json"))
    )
    (tmp_path / "snapshot.json").write_text(json.dumps(recorded(0)))
    total["snapshot"] = campaign(
        tmp_path / "snapshot.json", lambda: replay_history(snapshot.read(tmp_path / "snapshot.json"), 0)
    )
    for name, counts in total.items():
        print(f"{name}: {sum(counts.values())} damages, {dict(counts)}")
    print(f"{sum(map(Counter.total, total.values()))} damages of {len(total)} readings, {len(failures)} failures")
    assert not failures, "\n".join(failures)
