"""Settings: presets, options and `--set`; each mistake is one line that names the setting and what it takes."""

import dataclasses
import json
import re

import click
import pytest
from click.testing import CliRunner

import ds_cmli
from ds_cmli.common import UserError
from ds_cmli.config.options import PLACES, ConfigCommand, parse_losses, parse_setting, resolve_config
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.schema import SECTIONS, Config, compared, differences, load_config
from tests.models.sources import clip

SETTINGS = [f"{of}.{field.name}" for of, kind in SECTIONS.items() for field in dataclasses.fields(kind)]
FREE = ("image_overrides", "text_overrides", "overrides")  # of other libraries' models, which know what they take
TINY = load_preset("tiny", {})


def refused(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    return line


def resolved(*words: str) -> Config:
    """The configuration of a command's arguments."""
    configs = []

    @click.command(cls=ConfigCommand)
    def command(settings, **options):
        configs.append(resolve_config(settings))

    done = CliRunner().invoke(command, words, standalone_mode=False)
    if done.exception:
        raise done.exception
    return configs[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_a_round_trip(name, tmp_path):
    source = {"student": {"source": str(clip(tmp_path / "clip"))}} if name == "finetune" else {}
    config = load_preset(name, source)
    assert config.run.preset == name
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_is_the_documents_setting():
    config = load_preset("paper", {})
    assert (config.optim.micro_batch, config.data.context_length, config.student.embed_dim) == (256, 64, 256)
    assert config.data.image_size == 224  # 14 x 14 patches of 16 px: N = 196


def test_who_starts_from_a_model_gets_its_preset_unless_another_is_named(tmp_path):
    student = {"source": str(clip(tmp_path / "clip"))}
    assert load_preset(None, {"student": student}).run.preset == "finetune"
    assert load_preset(None, {"student": student, "run": {"preset": "quick"}}).run.preset == "quick"
    assert load_preset(None, {}).run.preset == "quick"
    assert "give the model to start from" in refused(load_preset, "finetune", {})


def test_losses_and_settings_are_parsed():
    assert parse_losses("global, cmli=0.5") == {"global": 1.0, "cmli": 0.5}
    given = {"student.layers=4": 4, "data.source=some/folder": "some/folder", "optim.betas=[0.9,0.95]": [0.9, 0.95]}
    assert [parse_setting(text) for text in given] == [(text.split("=")[0], value) for text, value in given.items()]
    assert load_preset("tiny", {"optim": {"betas": [0.9, 0.95]}}).optim.betas == (0.9, 0.95)
    for unclear in ("", "cmli=", "=1", "cmli,", "cmli,,global", "cmli=big"):
        assert "write NAME or NAME=WEIGHT" in refused(parse_losses, unclear)
    for unclear in ("", "student.layers", "layers=4", ".layers=4", "student.=4"):
        assert "write SECTION.SETTING=VALUE" in refused(parse_setting, unclear)
    assert "--set data.source" in refused(parse_setting, f"data.source={'[' * 5000}")


def test_the_last_one_given_counts():
    assert resolved("--steps", "3", "--steps=5").optim.steps == 5
    assert resolved("--lr", "1", "--set", "optim.lr=2").optim.lr == 2
    assert resolved("--set", "optim.lr=2", "--lr", "1", "--set", "optim.eps=1e-5").optim.lr == 1
    assert resolved("--set", "optim.lr=2", "--lr", "1", "--set", "optim.lr=3").optim.lr == 3
    assert resolved("--set", "student.layers=1", "--set", "student.layers=2").student.layers == 2
    assert resolved("--data", "a", "--data", "b").data.source == ["a", "b"]
    assert resolved("--deterministic", "--set", "run.deterministic=false").run.deterministic is False
    assert (resolved("--epochs", "2").optim.steps, resolved("--steps", "2").optim.epochs) == (None, None)


def test_random_weights_are_what_is_not_given():
    config = resolved("--init", "random", "--set", "student.text_weights=hub")
    assert (config.student.image_weights, config.student.text_weights) == ("random", "hub")
    assert (config.teacher.weights, config.data.tokenizer) == ("random", "builtin")


@pytest.mark.parametrize("name, value", {"lr": "-1", "epochs": "-1", "keep": "0", "losses": "cmli=-1"}.items())
def test_an_option_is_named_as_it_was_given(name, value):
    assert refused(resolved, f"--{name}", value).startswith(f"--{name}")
    setting, value = PLACES[name], value.replace("cmli=-1", '{"cmli": -1}')
    assert refused(resolved, f"--{name}", "1", "--set", f"{setting}={value}").startswith(setting)


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


LONG = "x" * 5000
MISTAKES = [
    ("student.layers", 0, "student.layers is 0: Input should be greater than or equal to 1"),
    ("student.layer", 4, "setting of student is 'layer': did you mean 'layers'?"),
    ("data.augmentation", {"flip": 1.0}, "data.augmentation.flip is 1.0: Input should be 'random_resized_crop', "),
    ("loss.weights", {"globl": 1.0}, "loss.weights is 'globl': did you mean 'global'?"),
    ("loss.weights", {"cmli": "a"}, "loss.weights.cmli is 'a': Input should be a valid number"),
    ("optim.betas", [0.9], "optim.betas.1 is missing: give it"),
    ("optim.betas", [0.9, 1.0], "optim.betas is [0.9, 1.0]: Input should be less than 1"),
    ("optim.negatives", 3, "optim.negatives is 3: Input should be 'micro_batch' or 'global_batch'"),
    ("run.preset", LONG, f"run.preset is {repr(LONG)[:100]} ... "),
]


@pytest.mark.parametrize("setting, value, line", MISTAKES, ids=[f"{s[:30]}-{v!r:.20}" for s, v, _ in MISTAKES])
def test_mistakes_name_setting_value_and_remedy(setting, value, line):
    section, key = setting.split(".")
    assert line in refused(load_preset, None if "preset" in key else "tiny", {section: {key: value}})


def test_mistakes_of_sections_and_of_several_settings():
    assert "give one of the two" in refused(load_preset, "tiny", {"optim": {"epochs": 1.0, "steps": 3}})
    assert refused(load_preset, "tiny", {"studnt": {}}) == "section of settings is 'studnt': did you mean 'student'?"
    assert refused(ds_cmli.fit, {"preset": "tiny"}) == "section of settings is 'preset': did you mean run.preset?"


DAMAGED = [
    b"{", b"[]", b'{"config": []}', b'{"config": {"student": {"new": 1}}}', b"\xff\xfe", b"[" * 3000,
    b'{"config": {"loss": {"weights": {"of_a_package": 1.0}}}}',
]  # fmt: skip


def test_the_config_of_a_run_is_whole_or_one_line(tmp_path):
    words = "its run.json is missing, damaged, of another version, or needs a --plugin: "
    for content in (None, *DAMAGED):
        if content is not None:
            (tmp_path / "run.json").write_bytes(content)
        line = refused(load_config, tmp_path / "run.json", "--checkpoint")
        assert line.startswith(f"--checkpoint is {str(tmp_path)!r}: {words}"), content
    (tmp_path / "run.json").write_text(json.dumps({"config": TINY.to_dict()}))
    assert load_config(tmp_path / "run.json", "--checkpoint") == TINY


def test_what_a_resumed_run_must_have_kept():
    now = compared(TINY, {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}, {"demo": "abc"})
    assert now["student.layers"] is None and now["deepspeed.zero_optimization.stage"] == 2
    assert now["run.seed"] == 0 and "run.eval_batch" not in now and "data.workers" not in now
    assert now["sources.demo"] == "abc" and not re.search("wall_clock|output_dir", " ".join(now))
    other = now | {"optim.lr": 2, "optim.micro_batch": 4}
    assert differences(now, other, same_ranks=False) == ["optim.lr: 0.001 -> 2"]
    assert differences(now, other, same_ranks=True) == ["optim.lr: 0.001 -> 2", "optim.micro_batch: 8 -> 4"]
    assert differences({}, {"a": 1}, True) == ["a: not set -> 1"]
