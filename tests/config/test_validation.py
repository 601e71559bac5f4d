"""Every setting with every kind of wrong value: refused in one line that names it, whichever way it comes."""

import dataclasses
import json
import re

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.options import WHAT, resolve_config
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, load_config, parse_losses, parse_settings
from tests.config.given import options

SETTINGS = {
    f"{section.name}.{field.name}": field
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(section.default_factory)
}
FREE = ("image_overrides", "text_overrides", "overrides")  # of other libraries' models, which know what they take
TINY = load_preset("tiny", {})


def refused(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    return line


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_a_value_of_a_wrong_type(name):
    section, key = name.split(".")
    good = getattr(getattr(TINY, section), key)
    for value in (float("nan"), float("inf"), -float("inf"), [[]], [None], "\0", "x" * 5000, 10**400, {"a": {}}, b"1"):
        if isinstance(value, dict) and key in FREE:
            continue
        line = refused(load_preset, "tiny", {section: {key: value}})
        assert line.startswith(name) and ": " in line
    for value in (True, 1, 1.5, "text", [1], {}, None):
        try:
            config = load_preset("tiny", {section: {key: value}})
        except UserError as error:
            assert str(error).startswith(name) or "give one of the two" in str(error)
            continue
        taken = getattr(getattr(config, section), key)
        assert taken == value and (isinstance(taken, type(good)) or good is None or taken is None), (name, taken)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("student.layers", 1, None), ("student.embed_dim", 1, 2048), ("student.dropout", 0, 0.99),
        ("data.image_size", 1, 4096), ("data.max_bad_share", 0, 1), ("loss.init_temperature", 0.01, 10),
        ("optim.warmup_share", 0, 0.99), ("optim.weight_decay", 0, None), ("optim.steps", 1, None),
        ("run.seed", 0, 2**31 - 1), ("run.save_minutes", 0, None), ("run.keep", 1, None), ("run.watchdog", 0, 10**6),
    ],
)  # fmt: skip
def test_ranges_end_where_the_line_says(name, low, high):
    section, key = name.split(".")
    for inside in (low, high if high is not None else 10**6):
        assert getattr(getattr(load_preset("tiny", {section: {key: inside}}), section), key) == inside
    outside = [low - 0.001 if isinstance(high, float) or key.endswith(("temperature", "share")) else low - 1]
    outside += [] if high is None else [high + 1]
    for value in outside:
        line = refused(load_preset, "tiny", {section: {key: value}})
        bound = low if value < low else round(high)
        assert line.startswith(f"{name} is {value!r}: ") and re.search(rf"\b({bound}|{bound + 1})\b", line)


def test_lines_say_what_is_accepted():
    def line(**sections):
        return refused(load_preset, "tiny", sections)

    assert line(optim={"betas": [0.9]}) == "optim.betas is [0.9]: Field required (a list of two)"
    assert line(optim={"betas": [0.9, 1.0]}) == (
        "optim.betas is [0.9, 1.0]: Input should be less than 1 (a list of two)"
    )
    assert line(loss={"weights": {"cmli": "a"}}) == "loss.weights is {'cmli': 'a'}: Input should be a valid number"
    assert line(loss={"weights": ["cmli"]}) == "loss.weights is ['cmli']: Input should be a valid dictionary"
    assert line(optim={"negatives": 3}) == "optim.negatives is 3: Input should be 'micro_batch' or 'global_batch'"
    assert line(loss={"weights": {"cmli": 1.0}, "start": {"target_cmli": 3}}) == (
        "loss.start is {'target_cmli': 3}: the losses are cmli, without target_cmli: leave it out"
    )
    assert line(loss={"start": {"clmi": 3}}) == (
        "loss.start is {'clmi': 3}: did you mean 'cmli'? Or give the --plugin that registers it"
    )
    assert line(loss={"start": {"cmli": 1}}) == (
        "loss.start is {'cmli': 1}: Input should be greater than or equal to 2"
    )
    assert line(loss={"weights": {"cmli": 1.0}, "start": {"cmli": 3}}) == (
        "loss.start is {'cmli': 3}: no loss counts in the first step: leave out one"
    )
    assert line(loss={"mse_reduction": "avg"}) == "loss.mse_reduction is 'avg': Input should be 'mean' or 'sum'"
    assert line(loss={"mse_reduction": ["sum"]}) == "loss.mse_reduction is ['sum']: Input should be 'mean' or 'sum'"
    assert line(loss={"target_text_weight": -1}) == (
        "loss.target_text_weight is -1: Input should be greater than or equal to 0 (0: not computed)"
    )
    assert line(loss={"target_image_weight": 0, "target_text_weight": 0}) == (
        "loss.target_text_weight is 0.0: loss.target_image_weight is 0 too: give one of them, or leave out target_cmli"
    )
    assert line(optim={"lr": float("inf")}) == "optim.lr is inf: Input should be a finite number"
    with pytest.raises(UserError, match=r"^student is \[1\]: Input should be a valid dictionary$"):
        Config.from_dict({"student": [1]})


def test_options_are_named_as_they_were_given():
    line = refused(resolve_config, (), options(lr=float("inf")))
    assert line == "--lr is inf: Input should be a finite number"
    line = refused(resolve_config, (), options(losses="cmli=-1"))
    assert line == "--losses is {'cmli': -1.0}: Input should be greater than 0"
    assert refused(resolve_config, ("optim.lr=-1",), options()) == "optim.lr is -1: Input should be greater than 0"


def test_nothing_is_given_twice():
    assert refused(parse_losses, "cmli,cmli=0.1") == "--losses has 'cmli' twice: keep one"
    for unclear in ("cmli=", "=1", "cmli,", "cmli,,global"):
        assert "write NAME or NAME=WEIGHT" in refused(parse_losses, unclear)
    for second in ("1", "2"):
        assert "--set student.layers is given twice" in refused(
            parse_settings, ("student.layers=1", f"student.layers={second}")
        )


@pytest.mark.parametrize(
    ("option", "value", "setting", "other"),
    [
        ("steps", 3, "optim.steps", "4"), ("epochs", 1.0, "optim.epochs", "2"), ("lr", 0.1, "optim.lr", "0.2"),
        ("micro_batch", 2, "optim.micro_batch", "4"), ("seed", 1, "run.seed", "2"), ("data", "a", "data.source", "b"),
        ("workers", 1, "data.workers", "2"), ("deterministic", True, "run.deterministic", "false"),
        ("losses", "cmli", "loss.weights", '{"global": 1}'), ("output_dir", "a", "run.output_dir", "b"),
        ("log_every", 1, "run.log_every", "2"), ("eval_every", 1, "run.eval_every", "2"), ("keep", 1, "run.keep", "3"),
        ("save_every", 1, "run.save_every", "2"), ("save_minutes", 1.0, "run.save_minutes", "2"),
    ],
)  # fmt: skip
def test_an_option_and_another_value_of_the_same_setting(option, value, setting, other):
    line = refused(resolve_config, (f"{setting}={other}",), options(**{option: value}))
    assert f"--{option.replace('_', '-')} is " in line and f"--set {setting} is " in line
    same = json.dumps({"cmli": 1.0} if option == "losses" else value)
    resolve_config((f"{setting}={same}",), options(**{option: value}))


def test_every_option_of_a_setting_is_compared():
    import click

    from ds_cmli.config.options import OUTPUT, PLACES, add

    command = add(*WHAT, *OUTPUT)(click.command()(lambda: None))
    names = {parameter.name for parameter in command.params}
    assert names - {*PLACES} == {"init", "settings", "deepspeed_config", "plugin"}


def test_presets_and_random_weights_are_not_contradicted():
    assert "--preset is 'tiny'" in refused(resolve_config, ("run.preset=demo",), options())
    for setting in ("student.image_weights", "student.text_weights", "teacher.weights"):
        assert f"--init is 'random' and --set {setting} is 'hub'" in refused(
            resolve_config, (f"{setting}=hub",), options(preset="demo", init="random")
        )


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"config": []}', b'{"config": {"student": 3}}', b'{"config": {"new": {}}}',
        b'{"config": {"student": {"new": 1}}}', b'{"config": {"optim": {"lr": NaN}}}', b"\xff\xfe", b"[" * 3000,
        b'{"config": {"optim": {"lr": "1"}}}', b'{"config": {"run": {"seed": ' + b"9" * 5000 + b"}}}",
    ],
)  # fmt: skip
def test_a_damaged_config_of_a_run(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    line = refused(load_config, tmp_path / "run.json", "--checkpoint")
    assert line.startswith(f"--checkpoint is {str(tmp_path)!r}: its run.json is damaged, or of another version: ")


def test_a_config_that_cannot_be_read(tmp_path):
    (tmp_path / "run.json").mkdir()
    assert "no run.json there" in refused(load_config, tmp_path / "run.json", "--checkpoint")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": TINY.to_dict()}))
    assert load_config(tmp_path / "run" / "run.json", "--checkpoint") == TINY


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("loss", "weights", {"of_a_package": 1.0}), ("student", "image_backbone", "of_a_package"),
        ("student", "text_backbone", "of_a_package"),
    ],
)  # fmt: skip
def test_a_name_that_a_package_would_register_is_no_damage(section, setting, value, tmp_path):
    content = TINY.to_dict()
    content[section] = {**content[section], setting: value}
    (tmp_path / "run.json").write_text(json.dumps({"config": content}))
    line = refused(load_config, tmp_path / "run.json", "--checkpoint")
    assert f"{section}.{setting}" in line and "of_a_package" in line and "damaged" not in line
    assert line.endswith("; or give the --plugin that registers it")
