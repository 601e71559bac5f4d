"""Runs of other seeds become a mean with its standard error, known by hand; the page holds what the files say."""

import base64
import io
import json
import math
import os
import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.config.settings import flatten
from ds_cmli.report.__main__ import command
from ds_cmli.report.runs import differing, groups, mean, read, read_all


def run(folder, seed: int, r1: float, **changes) -> str:
    folder.mkdir()
    config = load_preset("tiny", {"run": {"seed": seed, "output_dir": str(folder)}, **changes})
    (folder / "config.json").write_text(
        json.dumps({"config": config.to_dict(), "deepspeed": {"zero_optimization": {"stage": 2}}})
    )
    lines = [
        {"step": 1, "loss": 3.5, "loss/global": 2.0, "lr": 1e-3, "pairs_per_s": 10.0},
        {"step": 2, "loss": math.nan, "loss/global": 1.0, "lr": 5e-4, "pairs_per_s": 12.0},
        {
            "step": 2,
            "eval/seen/pairs": 300,
            "eval/seen/cmli/i2t_r1": r1,
            "eval/seen/cmli/t2i_r10": 0.875,
            "eval/seen/chance/i2t_r1": 0.0625,
            "eval/seen/cmli/mean_recall": 0.75,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_a_mean_has_the_standard_error_of_its_runs():
    assert str(mean([0.5])) == "0.500"
    result = mean([0.4, 0.5, 0.6])  # deviation 0.1, over the root of 3
    assert (result.value, result.count) == (pytest.approx(0.5), 3) and result.error == pytest.approx(0.1 / math.sqrt(3))


def test_seeds_are_one_group_and_other_settings_another(tmp_path):
    paths = [run(tmp_path / f"s{seed}", seed, 0.4 + seed / 10) for seed in range(3)]
    paths.append(run(tmp_path / "other", 0, 0.9, optim={"lr": 2e-3}))
    runs = [read(path) for path in paths]
    assert [[r.name for r in group] for group in groups(runs)] == [["s0", "s1", "s2"], ["other"]]
    assert differing([runs[0], runs[3]]) == {"optim.lr": [1e-3, 2e-3]}
    assert runs[0].curve("loss") == ([1], [3.5])  # what is not finite is no point
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}


def page(tmp_path, *paths) -> str:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(command, [*paths, "--output", str(tmp_path / "page.html")])
    several = "s" if len(paths) > 1 else ""
    assert done.output == f"report of {len(paths)} run{several}: {tmp_path}/page.html\n"
    return (tmp_path / "page.html").read_text()


def test_the_command_writes_one_page(tmp_path):
    paths = [run(tmp_path / f"s{seed}", seed, 0.4 + seed / 10) for seed in range(3)]
    paths.append(run(tmp_path / "other", 0, 0.9, optim={"lr": 2e-3}))
    (tmp_path / "other" / "memory.json").write_text(
        json.dumps({"prediction": {"categories": {"data": 1000}, "totals": {"requested": 5000}},
                    "measurement": {"categories": {"data": 1001}, "totals": {"requested": 5001}}})
    )  # fmt: skip
    text = page(tmp_path, *paths)
    assert "0.500 ± 0.058" in text and "<td>optim.lr</td><td>0.001</td><td>0.002</td>" in text
    assert re.search(r'background: #[0-9a-f]{6}"></span>data</td><td>1,000</td><td>1,001</td>', text)
    heads = '<th colspan="1">image to text</th><th colspan="1">text to image</th><th colspan="1"></th>'
    assert heads in text and "<th>R@1</th><th>R@10</th><th>mean recall</th>" in text
    # The best of a column is bold, all that are printed alike; chance never is.
    assert "<td>cmli: s0, s1, s2</td><td>0.500 ± 0.058</td><td><b>0.875 ± 0.000</b></td>" in text
    assert "<td>cmli: other</td><td><b>0.900</b></td><td><b>0.875</b></td><td><b>0.750</b></td>" in text
    assert "<td>chance: other</td><td>0.062</td><td></td><td></td>" in text
    assert "None in these runs: they are drawn for TensorBoard" in text
    order = ["Held-out results", "Settings that differ", "Charts", "Match maps", "Speed", "Memory"]
    assert re.findall("<h2>(.*?)</h2>", text) == [*order, "Settings of the first run"]
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "http" not in visible(text)


def visible(text: str) -> str:
    """Without the charts, which name the namespaces of SVG."""
    return re.sub(r"(?s)<svg.*?</svg>", "", text)


def test_every_column_is_drawn_and_one_evaluation_as_bars(tmp_path):
    path = run(tmp_path / "run", 0, 0.5)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        for step in (3, 4):
            values = {f"loss/{i}": float(i) for i in range(20)}
            file.write(json.dumps({"step": step, "skipped_steps": 7, **values}) + "\n")
    text = page(tmp_path, path)
    assert "<b>seen</b>: R@1 0.500 image to text (cmli); 300 pairs; chance 0.062" in text
    losses = next(part for part in text.split("<figure>") if "<figcaption>Losses" in part)
    assert all(f">{i}</text>" in losses for i in range(20)) and ">optimizer steps<" in losses
    recall = next(part for part in text.split("<figure>") if "<figcaption>Retrieval" in part)
    assert ">0.500<" in recall and ">cmli<" in recall and ">optimizer steps<" not in recall
    assert "<td>skipped_steps</td><td>7</td>" in text  # what no table or chart has


def test_what_a_name_holds_is_no_markup_and_no_formula(tmp_path):
    name = r"<script>alert(1)<$\foo$"
    text = page(tmp_path, run(tmp_path / name, 0, 0.5), run(tmp_path / "b", 0, 0.6, optim={"lr": 2e-3}))
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    short = "<b>$x"
    assert "&lt;b&gt;$x</text>" in page(tmp_path, run(tmp_path / short, 0, 0.5), str(tmp_path / "b"))


def test_runs_of_the_same_name_are_told_apart_and_one_run_is_given_once(tmp_path):
    (tmp_path / "x").mkdir()
    paths = [run(tmp_path / "a", 0, 0.5), run(tmp_path / "x" / "a", 0, 0.75, optim={"lr": 2e-3})]
    text = page(tmp_path, *paths)
    assert all(f"<td>cmli: {path}</td>" in text for path in paths) and "<b>0.750</b>" in text and "0.500" in text
    with pytest.raises(UserError, match="twice: give each run once"):
        read_all([paths[0], paths[0] + "/"])


def test_damaged_memory_is_one_line(tmp_path):
    path = run(tmp_path / "a", 0, 0.5)
    (tmp_path / "a" / "memory.json").write_text("{")
    with pytest.raises(UserError, match=r"its memory.json cannot be read: .*; remove the file"):
        read(path)


def test_the_last_match_maps_of_tensorboard_are_on_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    path = run(tmp_path / "run", 0, 0.5)
    with SummaryWriter(tmp_path / "run" / "tensorboard") as writer:
        for step, grey in ((5, 0), (10, 255)):
            writer.add_image("match-maps/seen/0", torch.full((3, 4, 4), grey, dtype=torch.uint8), step)
        writer.add_image("something/else", torch.zeros(3, 4, 4, dtype=torch.uint8), 10)
    done = CliRunner().invoke(command, [path, "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    (picture,) = re.findall('<img src="data:image/png;base64,([^"]*)" alt="match map of ([^"]*)">',
                            (tmp_path / "page.html").read_text())  # fmt: skip
    assert picture[1] == "seen/0, step 10"
    assert Image.open(io.BytesIO(base64.b64decode(picture[0]))).getpixel((0, 0)) == (255, 255, 255)


def test_a_run_whose_files_were_changed_is_refused(tmp_path):
    path = run(tmp_path / "a", 0, 0.5)
    config, lines = tmp_path / "a" / "config.json", tmp_path / "a" / "metrics.jsonl"
    config.write_text(json.dumps(checksums.sealed(json.loads(config.read_text()))))
    lines.with_name("metrics.jsonl.crc32").write_bytes(checksums.of_lines(lines.read_bytes()))
    read(path)
    lines.write_text(lines.read_text().replace("3.5", "3.4"))
    with pytest.raises(UserError, match=r"line 1 of its metrics.jsonl does not agree with its checksum"):
        read(path)
    config.write_text(config.read_text().replace('"context_length": 32', '"context_length": 33'))
    with pytest.raises(UserError, match=r"its config.json is damaged.* does not agree with its checksum"):
        read(path)


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no config.json there"):
        read(tmp_path)
    path = run(tmp_path / "a", 0, 0.5)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"it has no metrics.jsonl"):
        read(path)


def test_columns_of_earlier_versions_are_known_by_their_new_names(tmp_path):
    folder = run(tmp_path / "old", 0, 0.5)
    with open(tmp_path / "old" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "eval/seen/pointing": 0.75}) + "\n")
    assert read(folder).curve("eval/seen/pointing_game") == ([3], [0.75])


def test_none_is_the_best_of_runs_that_were_measured_on_different_pairs(tmp_path):
    same = [run(tmp_path / "a", 0, 0.5), run(tmp_path / "b", 0, 0.75, data={"workers": 1})]
    assert "<b>0.750</b>" in page(tmp_path, *same)
    other_data = run(tmp_path / "c", 0, 0.75, data={"val_source": "elsewhere"})
    assert "<b>0." not in page(tmp_path, same[0], other_data)
    other_count = run(tmp_path / "d", 0, 0.75, optim={"lr": 2e-3})
    file = tmp_path / "d" / "metrics.jsonl"
    file.write_text(file.read_text().replace("300", "4"))
    assert "<b>0." not in page(tmp_path, same[0], other_count)


DEEP, LONG = "[" * 10_000 + "]" * 10_000, "9" * 400


@pytest.mark.parametrize("line", [
    DEEP, '{"step": 3, "loss": ' + DEEP + "}", '{"step": 3, "loss": ' + LONG + "}", '{"step": 3, "loss": 1e300}',
    '{"step": -5}', '{"step": "3"}', '{"step": null}', '{"step": [3]}', '{"loss": 1.0}', '{"step": 1e3}', "3", '"a"',
    "{", '{"step": 3, "step": 4}', '{"step": 1' + "0" * 200 + "}", b"\xff\xfe", b'{"step": 3, "\xed\xa0\x80": 1}',
])  # fmt: skip
def test_a_damaged_line_of_metrics_is_one_line(line, tmp_path):
    path = run(tmp_path / "a", 0, 0.5)
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=r"its metrics.jsonl cannot be read: ") as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("content", [
    DEEP, "3", '"a"', '{"prediction": 3}', '{"prediction": {"totals": [1]}}',
    '{"measurement": {"categories": {"a": "b"}}}',
    '{"measurement": {"categories": {"a": ' + LONG + "}}}", '{"prediction": {"totals": {"a": null}}}', b"\xff\xfe",
])  # fmt: skip
def test_other_memory_is_one_line(content, tmp_path):
    path = run(tmp_path / "a", 0, 0.5)
    (tmp_path / "a" / "memory.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"its memory.json cannot be read: .*; remove the file") as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_halves_of_surrogate_pairs_and_a_line_that_is_being_written(tmp_path):
    path = str(tmp_path / "b\udce9")
    os.rename(run(tmp_path / "a", 0, 0.5), path)
    columns = {
        "step": 2,
        "loss/\ud800": 1.0,
        "eval/seen\udfff/cmli/i2t_r1": 0.25,
        "rest": "\ud834",
        "eval/seen/names": ["\udce9"],
    }
    with open(f"{path}/metrics.jsonl", "a") as file:
        file.write(json.dumps(columns) + "\n" + json.dumps(columns | {"loss/\ud800": 2.0}) + '\n{"step": 3, "lo')
    text = page(tmp_path, path)
    assert r"\ud800" in text and r"seen\udfff" in text and "0.250" in text and r"\udce9" in text
