"""A run as a model of the library that it began as, and as its own: `python -m ds_cmli.export RUN DIR --as ...`."""

import shlex
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.config.registry import score_scales
from ds_cmli.config.schema import load_config
from ds_cmli.errors import UserError
from ds_cmli.inference import Model
from ds_cmli.models import hf
from tests.make import picture, refused, write_run
from tests.models.sources import clip, export, library_of, library_weights, run_of, siglip, start, write_source
from tests.stranger.drive import compare


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = clip(tmp_path_factory.mktemp("sources") / "clip")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# CLIP\n")
    return folder


def test_without_as_it_is_the_runs_own_model(clip_folder, tmp_path):
    run = run_of(clip_folder, tmp_path / "run")
    folder = export(run, tmp_path / "own model")
    assert_close(load_file(folder / hf.WEIGHTS), load_file(run / hf.WEIGHTS), rtol=0, atol=0)
    compare(run, folder)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.rglob("*")))
    readme = (folder / "README.md").read_text()
    assert "# own model" in readme and "license: mit" in readme and "clip, licence: mit" in readme
    assert str(tmp_path) not in readme + (folder / "config.json").read_text() and len(readme.splitlines()) < 20


def test_the_readme_names_what_a_run_from_a_run_began_as(clip_folder, tmp_path):
    first = run_of(clip_folder, tmp_path / "first")
    second = run_of(first, tmp_path / "second")
    assert "clip, licence: mit" in (export(second, tmp_path / "x") / "README.md").read_text()
    readme = (export(write_run(tmp_path / "run"), tmp_path / "y") / "README.md").read_text()
    assert "vit_tiny_patch16_224 and bert" in readme and "Twemoji" in readme


def test_interpolated_it_is_between_the_source_and_the_trained_weights(clip_folder, tmp_path):
    run = run_of(clip_folder, tmp_path / "run")

    def exported(name, *options):
        return library_weights(export(run, tmp_path / name, "--as", "clip", *options))

    source = library_weights(clip_folder)
    trained = exported("trained")
    assert_close(exported("whole", "--interpolate", "1"), trained, rtol=0, atol=0)
    quarter = {name: 0.75 * source[name] + 0.25 * value for name, value in trained.items()}
    assert_close(exported("quarter", "--interpolate", "0.25"), quarter)
    averages = run_of(clip_folder, tmp_path / "other") / hf.WEIGHTS
    shutil.copy(averages, run / hf.AVERAGE)
    averaged = export(run, tmp_path / "averaged", "--ema", "--interpolate", "1")
    assert_close(load_file(averaged / hf.WEIGHTS), load_file(averages), rtol=0, atol=0)
    assert "1 of the way from student.source to the averaged weights" in (averaged / "README.md").read_text()


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "siglip"])
def test_at_share_0_an_export_is_the_source_in_every_tensor_whatever_was_trained(kind, tmp_path):
    losses = ("cmli",) if kind == "CLIP" else ("global", "cmli")  # none has the temperature of the source
    folder = write_source(tmp_path / "source", kind)
    run = run_of(folder, tmp_path / "run", losses=losses)
    source = library_weights(folder)
    library = library_of(kind)
    back = export(run, tmp_path / "share 0", "--as", library, "--interpolate", "0")
    assert_close(library_weights(back), source, rtol=0, atol=0)
    trained = library_weights(export(run, tmp_path / "trained", "--as", library))
    assert trained.keys() == source.keys()
    for name in source.keys() & {"logit_scale", "logit_bias"}:
        assert torch.equal(trained[name], source[name]), f"{name} is invented"


def test_a_temperature_that_no_run_trained_is_that_of_the_first_source(clip_folder, tmp_path):
    first = run_of(clip_folder, tmp_path / "first", losses=("cmli",))
    second = run_of(first, tmp_path / "second", losses=("cmli",))
    back = export(second, tmp_path / "back", "--as", "clip")
    assert torch.equal(library_weights(back)["logit_scale"], library_weights(clip_folder)["logit_scale"])
    trained = run_of(clip_folder, tmp_path / "trained")
    untrained = run_of(trained, tmp_path / "untrained", losses=("cmli",))
    expected = load_file(trained / hf.WEIGHTS)["losses.global.temperature.logit_scale"]
    assert library_weights(export(untrained, tmp_path / "again", "--as", "clip"))["logit_scale"] == expected


def test_the_command_that_ends_a_run_exports_it_whatever_it_began_as(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    untrained = export(run_of(clip_folder, tmp_path / "cmli", losses=("cmli",)), tmp_path / "exported")
    vit = write_source(tmp_path / "vit", "vit")
    even = clip(tmp_path / "even", text_width=32)
    runs = [
        (run_of(clip_folder, tmp_path / "a run"), "clip", None),
        (run_of(siglip(tmp_path / "siglip"), tmp_path / "run0"), "siglip", None),
        (run_of(vit, tmp_path / "run1"), "open_clip", None),
        # The others are exported without --as. With it they would be refused.
        (run_of(even, tmp_path / "run2", shared_blocks=1), "clip", "its models have no shared blocks, and the run"),
        (run_of(untrained, tmp_path / "run3", losses=("cmli",)), "clip", "no temperature of the loss 'global'"),
        (write_run(tmp_path / "run4"), "clip", "--as is 'clip', and the run's student began as two encoders"),
    ]
    best = {"metric": "", "value": 0.5, "step": 1, "chance": 0.1}
    engine: Any = None
    for run, library, problem in runs:
        options = [] if problem else ["--as", library]
        config = load_config(run / "run.json", "run")
        checkpoints = Checkpoints(run, engine, config.run, (1, True))
        *_, line = checkpoints.closing_lines(TrainState(step=1, evaluated=True, best=best), config)
        assert line.startswith("export:     python -m ds_cmli.export ")
        assert shlex.split(line)[4:] == [str(run), "FOLDER", *options]
        if problem:
            assert problem in refused(export, run, tmp_path / "FOLDER", "--as", library)
        shutil.rmtree(export(run, tmp_path / "FOLDER", *options))


def test_a_run_and_its_export_start_a_training(clip_folder, tmp_path):
    run = run_of(clip_folder, tmp_path / "run")
    trained = Model.load(run, "cpu")
    pictures = [picture(number) for number in range(3)]
    pixels = torch.stack([*map(trained.read, pictures)])
    for place in (run, export(run, tmp_path / "exported"), run / hf.WEIGHTS):
        objective, config, _ = start(place, freeze_text=1)
        with torch.no_grad():
            cls, _ = objective.student.image_embeddings(pixels)
        assert_close(cls, trained.embed_images(pictures).cls, rtol=0, atol=1e-6)
        assert score_scales(objective.scales()) == trained.evaluator.scales
        assert config.student.freeze_text == 1 and config.student.embed_dim == 24
    with pytest.raises(UserError, match="no such file or folder"):
        start(run / hf.AVERAGE)
    (run / hf.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^student.source [^\n]*cannot be loaded"):
        start(run)


def test_what_it_is_not_is_refused(clip_folder, tmp_path):
    run = write_run(tmp_path / "run")
    new = tmp_path / "x"
    gone = shutil.copytree(clip_folder, tmp_path / "gone")
    began = run_of(gone, tmp_path / "began")
    as_siglip = refused(export, began, new, "--as", "siglip")
    assert "--as is 'siglip', and the run's student began as clip" in as_siglip
    timm = run_of(write_source(tmp_path / "timm", "siglip"), tmp_path / "run2", data={"image_size": 240})
    assert "px: leave out --as" in refused(export, timm, new, "--as", "open_clip")
    assert "no student.source: leave it out" in refused(export, run, new, "--interpolate", "0.5")
    shutil.rmtree(gone)
    assert "no such file or folder" in refused(export, began, new, "--interpolate", "0.5")
    assert not new.exists()
