"""Settings: presets, options and `--set`; each mistake is one line that names the setting and what it takes."""

import dataclasses
import json

import click
import pytest
from click.testing import CliRunner

import ds_cmli
from ds_cmli.config.comparison import setting_changes, settings_to_keep
from ds_cmli.config.options import ConfigCommand
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.schema import SECTIONS, Config, load_config
from ds_cmli.errors import UserError
from tests import make
from tests.models.sources import clip

SETTINGS = [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]
FREE = ("image_overrides", "text_overrides", "overrides")  # of other libraries' models, which know what they take
TINY = load_preset("tiny", {})


def resolved(*words: str) -> Config:
    """The configuration of a command's arguments."""
    command = click.command(cls=ConfigCommand)(lambda settings, **options: load_preset(None, settings))
    done = CliRunner().invoke(command, words, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value


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
    assert "needs the model to start from" in make.refused(load_preset, "finetune", {})


def test_the_last_one_given_counts():
    assert resolved("--steps", "3", "--steps=5").optim.steps == 5
    assert resolved("--lr", "1", "--set", "optim.lr=2").optim.lr == 2
    assert resolved("--set", "optim.lr=2", "--lr", "1", "--set", "optim.weight_decay=0").optim.lr == 1
    assert resolved("--set", "optim.lr=2", "--lr", "1", "--set", "optim.lr=3").optim.lr == 3
    assert resolved("--data", "a", "--data", "b").data.source == ["a", "b"]
    assert resolved("--data", "123", "--output-dir=4", "--set", "data.image_root=text").data.source == "123"
    assert resolved("--deterministic", "--set", "run.deterministic=false").run.deterministic is False
    assert (resolved("--epochs", "2").optim.steps, resolved("--steps", "2").optim.epochs) == (None, None)
    config = resolved("--init", "random", "--set", "student.text_weights=hub")
    assert (config.student.image_weights, config.student.text_weights) == ("random", "hub")
    assert (config.teacher.weights, config.data.tokenizer) == ("random", "builtin")
    assert resolved("--losses", "global, cmli=0.5").loss.weights == {"global": 1.0, "cmli": 0.5}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_a_value_of_a_wrong_type(name):
    section, key = name.split(".")
    good = getattr(getattr(TINY, section), key)
    for value in (float("nan"), float("inf"), [[]], [None], "\0", "x" * 5000, 10**400, {"a": {}}, b"1"):
        if not (isinstance(value, dict) and key in FREE):
            line = make.refused(load_preset, "tiny", {section: {key: value}})
            assert line.startswith(name) and ": " in line
    for value in (True, 1, 1.5, "text", [1], {}, None):
        try:
            config = load_preset("tiny", {section: {key: value}})
        except UserError as error:
            assert str(error).startswith(name) or "give one of the two" in str(error)
            continue
        taken = getattr(getattr(config, section), key)
        assert taken == value and (isinstance(taken, type(good)) or good is None or taken is None), (name, taken)


MISTAKES = [
    (
        {"data": {"augmentation": {"flip": 1.0}}},
        "data.augmentation.flip.[key] is 'flip': Input should be 'random_resized_crop', ",
    ),
    ({"data": {"source": 3}}, "is 3: Input should be a valid string"),
    ({"loss": {"weights": {"cmli": "a"}}}, "loss.weights.cmli is 'a': Input should be a valid number"),
    ({"optim": {"negatives": 3}}, "optim.negatives is 3: Input should be 'micro_batch' or 'global_batch'"),
    ({"run": {"best_by": "zero_shot"}}, "run.best_by is 'zero_shot': give folders of classes by run.zero_shot"),
    ({"studnt": {}}, "section of settings is 'studnt': did you mean 'student'?"),
    ({"preset": "tiny"}, "section of settings is 'preset': did you mean run.preset?"),
    ({"student": 3}, "student is 3: give a mapping of settings"),
]


@pytest.mark.parametrize("sections, line", MISTAKES, ids=[line[:30] for _, line in MISTAKES])
def test_mistakes_name_setting_value_and_remedy(sections, line):
    assert line in make.refused(ds_cmli.fit, sections)


def test_the_config_of_a_run_is_whole_or_one_line(tmp_path):
    words = "its run.json is missing, damaged, of another version, or needs a --plugin: "
    plugins = b'{"config": {"loss": {"weights": {"of_a_package": 1.0}}}}'
    for content in (None, b"{", b'{"config": []}', b'{"config": {"student": {"new": 1}}}', b"[" * 3000, plugins):
        if content is not None:
            (tmp_path / "run.json").write_bytes(content)
        line = make.refused(load_config, tmp_path / "run.json", "--checkpoint")
        assert line.startswith(f"--checkpoint is {str(tmp_path)!r}: {words}"), content
    (tmp_path / "run.json").write_text(json.dumps({"config": TINY.to_dict()}))
    assert load_config(tmp_path / "run.json", "--checkpoint") == TINY


def test_what_a_resumed_run_must_have_kept():
    def kept(stage, sources, **changes):
        config = load_preset("tiny", changes)
        return settings_to_keep(
            config, {"zero_optimization": {"stage": stage}, "wall_clock_breakdown": stage > 1}, sources
        )

    first_settings = kept(1, {"demo": "abc", "a": {"images": 4}})  # an earlier version recorded less of the data
    free = {"run": {"output_dir": "x", "match_maps": 2}, "data": {"workers": 3}}
    same_sources = {"demo": "abc", "a": {"images": 4, "index": "x"}}
    assert list(setting_changes(first_settings, kept(1, same_sources, **free))) == []
    changes = {"optim": {"lr": 2}, "run": {"seed": 1}, "student": {"lora": {"text": ["q"]}}}
    other_sources = {"demo": "abc", "a": {"images": 5, "index": "x"}, "b": "c"}
    settings = kept(2, other_sources, data={"caption_weights": {"text": 1}}, **changes)
    assert list(setting_changes(first_settings, settings)) == [
        'data.caption_weights: null -> {"text": 1.0}',
        "deepspeed.zero_optimization.stage: 1 -> 2",
        "optim.lr: 0.001 -> 2.0",
        "run.seed: 0 -> 1",
        "sources.a.images: 4 -> 5",
        'sources.b: null -> "c"',
        'student.lora.text: null -> ["q"]',
    ]
