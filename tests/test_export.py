"""A run as a model of the library that it began as, and as its own: `python -m ds_cmli.export RUN DIR --as ...`."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ds_cmli.config.registry import score_scales
from ds_cmli.errors import UserError
from ds_cmli.export import command
from ds_cmli.inference import Model
from ds_cmli.models import hf
from tests.make import picture, write_run
from tests.models.sources import clip, of_open_clip, run_of, siglip, start
from tests.stranger.drive import compare


def export(run, folder, *options):
    command.main([str(run), str(folder), *options], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A CLIP."""
    folder = clip(tmp_path_factory.mktemp("sources") / "clip")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# CLIP\n")
    return folder


def test_without_as_it_is_the_runs_own_model(begun, tmp_path):
    run = run_of(begun, tmp_path / "run")
    folder = export(run, tmp_path / "own model")
    given, own = load_file(run / hf.WEIGHTS), load_file(folder / hf.WEIGHTS)
    assert given.keys() == own.keys() and all(torch.equal(given[name], own[name]) for name in own)
    compare(run, folder)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.rglob("*")))
    readme = (folder / "README.md").read_text()
    assert "# own model" in readme and "license: mit" in readme and "clip, licence: mit" in readme
    assert str(tmp_path) not in readme + (folder / "config.json").read_text() and len(readme.splitlines()) < 20


def test_the_readme_names_what_a_run_from_a_run_began_as(begun, tmp_path):
    first = run_of(begun, tmp_path / "first")
    second = run_of(first, tmp_path / "second")
    assert "clip, licence: mit" in (export(second, tmp_path / "x") / "README.md").read_text()
    readme = (export(write_run(tmp_path / "run"), tmp_path / "y") / "README.md").read_text()
    assert "vit_tiny_patch16_224 and bert" in readme and "Twemoji" in readme


def test_interpolated_it_is_between_the_source_and_the_trained_weights(begun, tmp_path):
    run, ends = run_of(begun, tmp_path / "run"), {}
    for share in ("0", "0.5", "1"):
        ends[share] = load_file(export(run, tmp_path / share, "--as", "clip", "--interpolate", share) / hf.WEIGHTS)
    source, plain = (load_file(x / hf.WEIGHTS) for x in (begun, export(run, tmp_path / "p", "--as", "clip")))
    for name, value in ends["0.5"].items():
        assert torch.equal(ends["0"][name], source[name]) and torch.equal(ends["1"][name], plain[name])
        torch.testing.assert_close(value, 0.5 * source[name] + 0.5 * plain[name])
    averages = run_of(begun, tmp_path / "other") / hf.WEIGHTS
    shutil.copy(averages, run / hf.AVERAGE)
    own = export(run, tmp_path / "own", "--ema", "--interpolate", "1")
    back = load_file(own / hf.WEIGHTS)
    assert all(torch.equal(value, back[name]) for name, value in load_file(averages).items())
    assert "1 of the way from student.source to the averaged weights" in (own / "README.md").read_text()


LIBRARIES = {
    "clip": (clip, ("cmli",)),  # and the losses that are trained, none with the temperature of the source
    "siglip": (siglip, ("global", "cmli")),
    "open_clip": (lambda folder: of_open_clip(folder, "siglip"), ("global", "cmli")),
}


def test_at_share_0_an_export_is_the_source_in_every_tensor_whatever_was_trained(tmp_path):
    for library, (make, losses) in LIBRARIES.items():
        folder = make(tmp_path / library / "source")
        run = run_of(folder, tmp_path / library / "run", losses=losses)
        begun = load_file(min(folder.glob("*.safetensors")))
        for share in ("0", None):
            options = () if share is None else ("--interpolate", share)
            back = export(run, tmp_path / library / f"back {share}", "--as", library, *options)
            written = load_file(min(back.glob("*.safetensors")))
            assert written.keys() == begun.keys()
            same = {name for name, value in begun.items() if torch.equal(value, written[name])}
            if share == "0":
                assert same == begun.keys(), f"{library}: {sorted(begun.keys() - same)[:3]} differ"
            assert begun.keys() & {"logit_scale", "logit_bias"} <= same, f"{library}: invented"


def test_a_temperature_that_no_run_trained_is_that_of_the_first_source(begun, tmp_path):
    first = run_of(begun, tmp_path / "first", losses=("cmli",))
    second = run_of(first, tmp_path / "second", losses=("cmli",))
    back = export(second, tmp_path / "back", "--as", "clip")
    assert torch.equal(load_file(back / hf.WEIGHTS)["logit_scale"], load_file(begun / hf.WEIGHTS)["logit_scale"])
    trained = run_of(begun, tmp_path / "trained")
    after = run_of(trained, tmp_path / "after", losses=("cmli",))
    wanted = load_file(trained / hf.WEIGHTS)["losses.global.temperature.logit_scale"]
    assert load_file(export(after, tmp_path / "again", "--as", "clip") / hf.WEIGHTS)["logit_scale"] == wanted
    own = export(first, tmp_path / "own")
    with pytest.raises(UserError, match=r"^student.source is '[^\n]*no temperature of the loss 'global'[^\n]*$"):
        export(run_of(own, tmp_path / "lost", losses=("cmli",)), tmp_path / "x", "--as", "clip")


def test_a_run_and_its_export_start_a_training(begun, tmp_path):
    run = run_of(begun, tmp_path / "run")
    own, wanted = export(run, tmp_path / "own"), Model.load(run, "cpu")
    pictures = [picture(number) for number in range(3)]
    pixels = torch.stack([*map(wanted.read, pictures)])
    for place in (run, own, run / hf.WEIGHTS):
        objective, config, _ = start(place, freeze_text=1)
        with torch.no_grad():
            cls, _ = objective.student.image_embeddings(pixels)
        torch.testing.assert_close(cls, wanted.embed_images(pictures).cls, rtol=0, atol=1e-6)
        assert score_scales(objective.scales()) == wanted.evaluator.scales
        assert config.student.freeze_text == 1 and config.student.embed_dim == 24
    with pytest.raises(UserError, match="no such file or folder"):
        start(run / hf.AVERAGE)
    (run / hf.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^student.source [^\n]*cannot be loaded"):
        start(run)


def test_what_it_is_not_is_refused(begun, tmp_path):
    def refused(problem, *arguments):
        with pytest.raises(UserError, match=f"^[^\n]*{problem}[^\n]*$"):
            export(*arguments)
        assert not (tmp_path / "x").exists()

    run, new = write_run(tmp_path / "run"), tmp_path / "x"
    gone = shutil.copytree(begun, tmp_path / "gone")
    began = run_of(gone, tmp_path / "began")
    refused("--as is 'siglip', and the run's student began as clip", began, new, "--as", "siglip")
    refused("began as two encoders", run, new, "--as", "clip")
    even = run_of(clip(tmp_path / "even", text_width=32), tmp_path / "run2", shared_blocks=1)
    refused("its models have no shared blocks, and the run", even, new, "--as", "clip")
    refused("no student.source: leave it out", run, new, "--interpolate", "0.5")
    shutil.rmtree(gone)
    refused("no such file or folder", began, new, "--interpolate", "0.5")
