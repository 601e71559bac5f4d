"""The plan of an ablation, a TOML file: which runs there are, and what is compared."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse_toml
from ds_cmli.config import plugins
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import STRICT, Config, Name, Sections
from ds_cmli.config.validation import build, check, choice
from ds_cmli.evaluate.report import SCORES

PLUGIN = "profiling.learning.plugin"  # registers the losses of the experiments

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Margin = Annotated[float, Field(gt=0, le=1)]

METRICS = [f"{way}_r{k}" for way, k in product(("i2t", "t2i"), (1, 5, 10))] + ["mean_recall"]
MEASURED = [f"{score}/{metric}" for score, metric in product(SCORES, METRICS)] + ["pointing_game"]
DEMO_SPLITS = ("seen", "unseen")
# What profiling/learning/endpoints.py measures of a run that has ended.
AFTERWARDS = (
    *("unseen/mean_recall", "seen/mean_recall", "style/mean_recall"),
    *("one_name/captions", "one_name/pictures", "swap/captions", "swap/pictures"),
    *("match/all", "match/attribute", "match/head", "match/other", "probe/accuracy"),
    "segmentation/miou",
)
# How an endpoint is named.
FORM = (
    f"write eval/SPLIT/METRIC, for instance eval/seen/{MEASURED[6]}, or one of "
    f"{', '.join(AFTERWARDS)}"
)
OF_AN_ARM = ("seeds", "grid", "deepspeed_config")  # in addition to its settings
OF_THE_PLAN = {"preset": "preset", "seed": "seeds", "output_dir": "--out"}  # settings of `run`


@checked(config=STRICT)
class Contrast:
    """The paired difference of an arm to another one."""

    arm: str = ""
    against: str = ""
    planned: bool = False  # whether Holm's correction counts it
    # The margin within which the two are to be shown equivalent; null: the two are to differ.
    equivalence: Margin | None = None
    label: str = ""  # its name in the picture, which has those with names alone if there are any

    def __str__(self) -> str:
        return f"{self.arm} - {self.against}"


@checked(config=STRICT)
class PlanFile:
    """The keys of the file."""

    preset: Name = "demo"
    settings: dict[str, Any] = Field(default_factory=dict)  # of all arms
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)  # settings, and `OF_AN_ARM`
    seeds: list[Seed] = Field(default_factory=list)  # of arms that name none
    tuning_seeds: list[Seed] = Field(default_factory=list)  # only for --tuning
    # Values of settings, as {"optim.lr": [1e-4, 2e-4]}, all combinations of which --tuning tries;
    # an arm's own `grid` adds to it.
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    endpoints: list[str] = Field(default_factory=list)  # on which the contrasts are decided
    secondary: list[str] = Field(default_factory=list)  # endpoints that are described alone
    contrasts: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One training of an arm."""

    arm: str
    seed: int
    preset: str
    settings: dict[str, Any]  # by "section.name", without the seed
    deepspeed_config: str = ""  # the JSON; "": train.py's own

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"

    def described(self) -> str:
        """The settings as one line, by which a run is known to be the plan's."""
        shown = [f"{name}={json.dumps(value)}" for name, value in sorted(self.settings.items())]
        if self.deepspeed_config:
            json_file = Path(self.deepspeed_config)
            digest = hashlib.sha256(json_file.read_bytes()).hexdigest()[:8]
            shown.append(f"{json_file.name}:{digest}")
        return " ".join([self.preset, *shown])

    def arguments(self, folder: Path) -> list[str]:
        """The options of train.py."""
        out = ["--preset", self.preset, "--output-dir", str(folder), "--seed", str(self.seed)]
        for name, value in self.settings.items():
            out += ["--set", f"{name}={json.dumps(value)}"]
        if self.deepspeed_config:
            out += ["--deepspeed_config", self.deepspeed_config]
        return out


@dataclass(frozen=True)
class Arm:
    name: str
    settings: Sections
    seeds: list[int]
    deepspeed_config: str = ""

    def tuned(self, grid: dict[str, list[Any]], seeds: list[int]) -> "list[Arm]":
        """An arm for each combination of the grid's values, named by its number, from 0."""
        if not grid:
            return [replace(self, seeds=seeds)]
        out = []
        for number, values in enumerate(product(*grid.values())):
            settings = {section: dict(own) for section, own in self.settings.items()}
            for name, value in zip(grid, values, strict=True):
                section, _, setting = name.partition(".")
                settings.setdefault(section, {})[setting] = value
            out.append(replace(self, name=f"{self.name}.{number}", settings=settings, seeds=seeds))
        return out


@dataclass(frozen=True)
class Plan:
    preset: str
    arms: dict[str, Arm]
    endpoints: list[str]
    contrasts: list[Contrast]
    secondary: list[str] = field(default_factory=list)
    file: Path | None = None

    @property
    def measured(self) -> list[str]:
        return [*self.endpoints, *self.secondary]

    def seeds(self, arm: str) -> list[int]:
        return self.arms[arm].seeds

    def runs(self) -> list[Run]:
        """All runs, those of one seed together, so that pairs are complete early."""
        out = []
        for arm in self.arms.values():
            settings = {
                f"{section}.{name}": value
                for section, values in arm.settings.items()
                for name, value in values.items()
            }
            for seed in arm.seeds:
                out.append(Run(arm.name, seed, self.preset, settings, arm.deepspeed_config))
        return sorted(out, key=lambda run: run.seed)


def load(path: Path, tuning: bool = False) -> Plan:
    """Read a plan and check everything in it. Raises `UserError`.

    Args:
        tuning: the plan of its tuning seeds: each arm once for each combination of the grid, by the
            first endpoint alone, without contrasts.
    """
    plugins.load(PLUGIN)
    try:
        values = parse_toml(path.read_text(encoding="utf-8"))
        return replace(_plan(values, tuning, path.parent), file=path)
    except (UserError, ValueError) as error:
        raise UserError(f"PLAN is {str(path)!r}: {error}") from None


def _plan(values: dict[str, Any], tuning: bool, folder: Path) -> Plan:
    names = {f"plan.{name}": name for name in PlanFile.__dataclass_fields__}  # type: ignore[attr-defined]
    file = build(PlanFile, "plan", values, names)
    check(bool(file.arms), "arms", file.arms, "name some, as [arms.NAME]")
    _check_once("tuning_seeds", file.tuning_seeds)
    arms: dict[str, Arm] = {}
    tuned: dict[str, Arm] = {}
    configs = []
    for name, given in file.arms.items():
        arms[name] = arm = _arm(name, given, file, folder)
        configs.append(_config(file.preset, arm))
        for point in arm.tuned(_grid(name, given, file), file.tuning_seeds):
            check(point.name not in tuned, "arms", point.name, "an arm of the grid has this name")
            tuned[point.name] = point
            _config(file.preset, point)
    check(bool(file.endpoints), "endpoints", file.endpoints, FORM)
    measured = [*file.endpoints, *file.secondary]
    _check_once("endpoints and secondary", measured)
    for endpoint, config in product(measured, configs):
        _check_endpoint(endpoint, config)
    contrasts = [_contrast(i, one, arms) for i, one in enumerate(file.contrasts)]
    if tuning:
        check(bool(file.tuning_seeds), "tuning_seeds", [], "--tuning needs some")
        return Plan(file.preset, tuned, file.endpoints[:1], [])
    return Plan(file.preset, arms, file.endpoints, contrasts, file.secondary)


def _grid(name: str, given: dict[str, Any], file: PlanFile) -> dict[str, list[Any]]:
    own = given.get("grid", {})
    lists = isinstance(own, dict) and all(isinstance(values, list) for values in own.values())
    check(lists, f"arms.{name}.grid", own, 'write lists, as grid = { "optim.lr" = [1e-4, 2e-4] }')
    grid = {**file.grid, **own}
    for setting, values in grid.items():
        section, dot, key = setting.partition(".")
        check(bool(dot), "grid", setting, 'write "SECTION.SETTING" = [VALUE, ...]')
        of_the_plan = section == "run" and key in OF_THE_PLAN
        check(not of_the_plan, "grid", setting, "leave it out: the plan or the command gives it")
        check(bool(values), f"grid {setting}", values, "give some values")
    return grid


def _arm(name: str, given: dict[str, Any], file: PlanFile, folder: Path) -> Arm:
    where = f"arms.{name}"
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None
    check(plain, "arms", name, "a name becomes a folder's: give letters, digits, '_', '.' and '-'")
    settings: Sections = {}
    own = {section: values for section, values in given.items() if section not in OF_AN_ARM}
    for place, sections in (("settings", file.settings), (where, own)):
        for section, changed in sections.items():
            tables = isinstance(changed, dict)
            need = "write settings as SECTION.SETTING = VALUE, for instance student.layers = 4"
            check(tables, f"{place}.{section}", changed, need)
            settings.setdefault(section, {}).update(changed)
    for setting, instead in OF_THE_PLAN.items():
        value = settings.get("run", {}).get(setting)
        check(value is None, f"{where}.run.{setting}", value, f"leave it out: {instead} gives it")
    seeds = given.get("seeds", file.seeds)
    numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    check(bool(numbers and seeds), f"seeds of arm {name}", seeds, "give a list, as seeds = [0, 1]")
    _check_once(f"seeds of arm {name}", seeds)
    both = sorted({*seeds} & {*file.tuning_seeds})
    check(not both, "tuning_seeds", file.tuning_seeds, f"{both} are seeds of arm {name} too")
    json_file = given.get("deepspeed_config", "")
    if json_file:
        is_file = isinstance(json_file, str) and (folder / json_file).is_file()
        check(
            is_file, f"{where}.deepspeed_config", json_file, "give a file, from the plan's folder"
        )
        json_file = str(folder / json_file)
    return Arm(name, settings, seeds, json_file)


def _config(preset: str, arm: Arm) -> Config:
    try:
        return load_preset(preset, arm.settings)
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from None


def _check_once(setting: str, values: list[Any]) -> None:
    for value in values:
        check(values.count(value) == 1, setting, values, f"has {value!r} twice: keep one")


def _check_endpoint(endpoint: str, config: Config) -> None:
    if endpoint in AFTERWARDS:
        scenes = config.data.source == "demo"
        check(scenes, "endpoints", endpoint, "it needs the demo's scenes: data.source = 'demo'")
        return
    prefix, _, rest = endpoint.partition("/")
    split, _, metric = rest.partition("/")
    check(prefix == "eval" and bool(metric), "endpoints", endpoint, FORM)
    choice(f"metric of endpoint {endpoint}", metric, MEASURED)
    if config.data.source == "demo":
        choice(f"split of endpoint {endpoint}", split.removesuffix("_ema"), DEMO_SPLITS)


def _contrast(number: int, given: dict[str, Any], arms: dict[str, Arm]) -> Contrast:
    out = build(Contrast, f"contrasts[{number}]", given, {})
    choice(f"contrasts[{number}].arm", out.arm, arms)
    choice(f"contrasts[{number}].against", out.against, arms)
    check(out.arm != out.against, f"contrasts[{number}].against", out.against, "name another arm")
    return out
