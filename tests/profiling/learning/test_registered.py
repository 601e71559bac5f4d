"""Whether a plan had a run before it ran, by git; and that docs/learning says no more than its lines."""

import re
import subprocess

import pytest

from profiling.learning import records, registered
from profiling.learning.plan import load
from profiling.learning.report import arms_table, runs_table
from tests.conftest import ROOT

PLAN = """\
preset = "tiny"
seeds = [0, 1]
tuning_seeds = [10]
grid = { "optim.lr" = [1e-3, 3e-3] }
endpoints = ["eval/seen/combined/mean_recall"]

[arms.base]
[arms.more]
deepspeed_config = "more.json"
optim.lr = 2e-3

[[contrasts]]
arm = "more"
against = "base"
planned = true
"""
LEARNING = ROOT / "docs" / "learning"
PAGES = {"plan": "results", "cut": "cut", "thesis": "thesis"}  # the report of each plan


@pytest.fixture
def committed(tmp_path):
    """A repository whose plan is committed twice; the second time its arm and its seeds are others."""

    def git(*command: str) -> str:
        name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *name, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "plan.toml"
    revisions = [""]
    for json, text in (("{}", PLAN), ('{"a": 1}', PLAN.replace("2e-3", "4e-3").replace("[0, 1]", "[0, 1, 2]"))):
        (file.parent / "more.json").write_text(json)
        file.write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", "plan")
        revisions.append(git("rev-parse", "HEAD"))
    git("commit", "-q", "--allow-empty", "-m", "away", "--no-verify")
    git("rm", "-q", "--cached", "plans/plan.toml")
    git("commit", "-q", "-m", "without it")
    revisions.append(git("rev-parse", "HEAD"))
    return file, revisions


def test_a_line_says_whether_the_plan_had_the_run_at_its_revision(committed):
    file, (_, first, second, away) = committed
    plan = load(file)
    settings = {run.arm: run.described() for run in plan.runs()}

    def verdict(arm: str, seed: int, revision: str) -> str:
        line = {"arm": arm, "seed": str(seed), "settings": settings.get(arm, arm), "revision": revision}
        return registered.fill(plan, line)["in_plan"]

    assert [verdict("base", seed, first) for seed in (0, 1, 2)] == ["yes", "yes", "no, other seeds"]
    assert [verdict("more", seed, first) for seed in (0, 2)] == ["no, other settings"] * 2
    assert [verdict("more", seed, second) for seed in (0, 2)] == ["yes", "yes"]
    assert verdict("base", 0, f"{first}+") == "yes"  # sources were changed, the plan is that of the revision
    assert verdict("tiny optim.lr=0.003", 10, first) == "yes"  # a point of the tuning grid
    assert verdict("base", 0, away) == "no, no plan"
    assert [verdict("base", 0, revision) for revision in ("", "None", "f" * 40)] == ["unknown"] * 3


def test_a_changed_json_beside_the_plan_is_another_setting(committed):
    file, (_, first, second, _) = committed
    (file.parent / "more.json").write_text("{}")
    file.write_text(PLAN)
    plan = load(file)
    line = {"arm": "more", "seed": "0", "settings": plan.runs()[1].described()}
    assert registered.fill(plan, {**line, "revision": first})["in_plan"] == "yes"
    assert registered.fill(plan, {**line, "revision": second})["in_plan"] == "no, other settings"


def test_what_is_known_stays_and_contrasts_are_those_of_the_revision(committed):
    file, (_, first, *_) = committed
    plan = load(file)
    line = {"arm": "base", "seed": "0", "settings": "tiny", "revision": first}
    filled = registered.fill(plan, line)
    assert filled == {**line, "in_plan": "yes", "planned": "more - base in eval/seen/combined/mean_recall"}
    known = {**filled, "in_plan": "no, other seeds"}
    assert registered.fill(plan, known) == known


@pytest.mark.parametrize("name", ["plan", "cut", "thesis", "tuning"])
def test_the_lines_of_docs_say_what_git_says(name):
    plan = load(LEARNING / f"{'plan' if name == 'tuning' else name}.toml", name == "tuning")
    lines = records.load(LEARNING / f"{name}.csv")
    again = {}
    for key, line in lines.items():
        again[key] = registered.fill(plan, {**line, "in_plan": "", "planned": ""})
    if {line["in_plan"] for line in again.values()} == {registered.UNKNOWN}:
        pytest.skip("no history of git")
    assert again == lines
    later = [line["in_plan"] for line in lines.values() if line["in_plan"] != registered.YES]
    expected = {
        "plan": ["no, other settings"] * 15,
        "cut": ["no, other seeds"] * 16,
        "thesis": ["no, other settings"],
        "tuning": ["no, other settings"] * 7,
    }
    assert later == expected[name]


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_docs_are_of_the_lines(name):
    plan, lines = load(LEARNING / f"{name}.toml"), records.load(LEARNING / f"{name}.csv")
    page = (LEARNING / f"{PAGES[name]}.md").read_text()
    for table in (runs_table(plan, lines), arms_table(plan, lines, plan.endpoints)):
        assert table.markdown() in page


def contrasts(page: str) -> dict[str, list[str]]:
    """The cells of each contrast's line in a report; of several, the first."""
    out: dict[str, list[str]] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if re.fullmatch(r"\w+ - \w+", cells[0]) and len(cells) == 8 and cells[3] != "-":
            out.setdefault(cells[0], cells)
    return out


def test_the_sentences_of_docs_round_the_tables():
    lines = (ROOT / "docs" / "learning.md").read_text()
    lines = re.sub(
        r"\s+", " ", lines[lines.index("The planned contrasts, mean") : lines.index("The thesis that asked")]
    )
    tables = contrasts((LEARNING / "results.md").read_text())
    named = rf"({'|'.join(tables)}) ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)(?:, p = (\d[\d.]*\d|\d))?"
    seen = set()
    for contrast, *figures, p in re.findall(named, lines):
        _, _, _, difference, interval, _, _, holm = tables[contrast]
        exact = [difference.split()[0], *interval.split(" to ")]
        for figure, cell in zip(figures, exact, strict=True):
            assert abs(float(figure) - float(cell)) <= 0.00051, (contrast, figure, cell)
        bounds = [float(end) for end in exact[1:]]
        excludes_0 = bounds[0] * bounds[1] > 0
        adjusted = float(holm.removesuffix(" (exploratory)"))
        shown = lines.index(f"{contrast} {figures[0]}") < lines.index("Not shown (")
        assert shown == (adjusted < 0.05), contrast
        assert not (excludes_0 and not shown) or float(p) == pytest.approx(adjusted, rel=0.05), contrast
        seen.add(contrast)
    exploratory = {name for name, cells in tables.items() if cells[-1].endswith("(exploratory)")}
    assert seen == exploratory and len(seen) == 19


def test_the_table_of_losses_rounds_the_tables():
    page = (LEARNING / "results.md").read_text()
    learning = (ROOT / "docs" / "learning.md").read_text()
    lines = learning[learning.index("| trained, 100 steps") : learning.index("All-pairs CMLI teaches")]
    tables = contrasts(page)
    every = {cells[3].split()[0]: cells for cells in tables.values()}
    chance = re.search(r"\| chance \|  \| ([\d.]+) \|", page)
    assert chance is not None and f"chance {float(chance[1]):.3f}" in learning
    rows = re.findall(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\) \| (.+) \|", lines)
    assert len(rows) == 11
    for difference, low, high, status in rows:
        matches = []
        for value, cells in every.items():
            ends = cells[4].split(" to ")
            three = [float(value), *map(float, ends)]
            for sign, said in ((1, three), (-1, [-three[0], -three[2], -three[1]])):
                if all(abs(x - float(y)) <= 0.00051 for x, y in zip(said, (difference, low, high), strict=True)):
                    matches.append((sign, cells))
        assert matches, difference
        (_, cells), *_ = matches
        planned = not cells[-1].endswith("(exploratory)")
        shown = float(cells[-1].removesuffix(" (exploratory)")) < 0.05
        assert status == f"{'planned' if planned else 'exploratory'}, {'shown' if shown else 'not shown'}"
