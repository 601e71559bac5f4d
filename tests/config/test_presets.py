import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.schema import Config, parse_losses, parse_settings
from tests.models.dual_models import clip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_a_round_trip(name, tmp_path):
    source = {"student": {"source": str(clip(tmp_path / "clip"))}} if name == "finetune" else {}
    config = load_preset(name, source)
    assert config.run.preset == name
    assert Config.from_dict(config.to_dict()) == config


def test_paper_is_the_documents_setting():
    config = load_preset("paper", {})
    assert (config.optim.micro_batch, config.data.context_length, config.student.embed_dim) == (256, 64, 256)
    assert config.data.image_size == 224  # 14 x 14 patches of 16 px: N = 196


def test_finetune_needs_a_model():
    with pytest.raises(UserError, match=r"^run.preset is 'finetune', and no model is given to start from: give "):
        load_preset("finetune", {})


def test_who_starts_from_a_model_gets_its_preset_unless_another_is_named(tmp_path):
    student = {"source": str(clip(tmp_path / "clip"))}
    assert load_preset(None, {"student": student}).run.preset == "finetune"
    assert load_preset(None, {"student": student, "run": {"preset": "quick"}}).run.preset == "quick"
    assert load_preset(None, {}).run.preset == "quick"


def test_overrides_win_over_the_preset():
    config = load_preset("tiny", {"student": {"layers": 1}, "optim": {"steps": 3}})
    assert (config.student.layers, config.optim.steps, config.student.embed_dim) == (1, 3, 16)


def test_losses_and_settings_are_parsed():
    assert parse_losses("global, cmli=0.5") == {"global": 1.0, "cmli": 0.5}
    result = parse_settings(("student.layers=4", "data.source=some/folder", "optim.betas=[0.9,0.95]"))
    assert result == {"student": {"layers": 4}, "data": {"source": "some/folder"}, "optim": {"betas": [0.9, 0.95]}}
    assert load_preset("tiny", {"optim": {"betas": [0.9, 0.95]}}).optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"student": {"layers": 0}}, "student.layers is 0"),
        ({"student": {"layers": "four"}}, "student.layers is 'four': Input should be a valid integer"),
        ({"student": {"layers": True}}, "student.layers is True: Input should be a valid integer"),
        ({"student": {"layer": 4}}, "did you mean 'layers'?"),
        ({"loss": {"weights": {"globl": 1.0}}}, "did you mean 'global'?"),
        ({"loss": {"init_temperature": 0.001}}, "1/temperature is at most 100"),
        ({"optim": {"epochs": 1.0, "steps": 3}}, "give one of the two"),
        ({"modle": {}}, "configuration section is 'modle'"),
    ],
)
def test_mistakes_name_setting_value_and_remedy(overrides, words):
    with pytest.raises(UserError) as error:
        load_preset("tiny", overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
