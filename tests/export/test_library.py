"""A student that began as a CLIP or SigLIP model is one of transformers again: `--as`."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.__main__ import command as evaluate
from ds_cmli.export.library import TOKENS
from ds_cmli.inference import Model
from tests.export.libraries import TEXTS, after_ten_steps, export, run_of
from tests.models.dual_models import clip, siglip, start
from tests.ranks import free_port

LOSSES = {"clip": {"global": 1.0, "cmli": 1.0}, "siglip": {"global_sigmoid": 1.0, "cmli": 1.0}}
AS = {"clip": "clip", "siglip": "siglip"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"clip": clip(root / "clip"), "siglip": siglip(root / "siglip")}


@pytest.mark.parametrize("kind", AS)
def test_untrained_its_weights_are_the_sources_to_the_bit(kind, sources, tmp_path):
    run = run_of(sources[kind], tmp_path / "run", LOSSES[kind], trained=False)
    folder = export(run, tmp_path / "back", "--as", AS[kind])
    given, back = load_file(sources[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert given.keys() == back.keys()
    for name, value in given.items():
        assert torch.equal(value, back[name]), name


@pytest.mark.parametrize("trained", [run_of, pytest.param(after_ten_steps, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", AS)
def test_trained_the_library_computes_its_features(kind, trained, sources, tmp_path, pictures, alone):
    run = trained(sources[kind], tmp_path / "run", LOSSES[kind])
    shutil.copytree(sources[kind], tmp_path / "source")  # of which nothing is read
    folder = export(run, tmp_path / "back", "--as", AS[kind])
    ours, theirs = Model.load(run, device="cpu"), AutoModel.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    length = theirs.config.text_config.max_position_embeddings
    words = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", max_length=length, return_tensors="pt")
    attended = {"attention_mask": words["attention_mask"]} if kind == "clip" else {}
    with torch.no_grad():
        images = F.normalize(theirs.get_image_features(**pixels).pooler_output)
        texts = F.normalize(theirs.get_text_features(input_ids=words["input_ids"], **attended).pooler_output)
    torch.testing.assert_close(ours.embed_images(pictures).cls, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_texts(TEXTS).cls, texts, rtol=0, atol=1e-5)
    assert ours.objective.score_scales()["global"] == pytest.approx(theirs.logit_scale.exp().item())
    given, back = load_file(sources[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert not torch.equal(given["logit_scale"], back["logit_scale"])
    maps = load_file(folder / TOKENS)
    own = ours.student.text.token_head.state_dict()  # type: ignore[union-attr]
    assert torch.equal(maps["text.weight"], own["weight"])


def test_what_it_is_not_is_refused(sources, run, tmp_path):
    def refused(problem, *arguments):
        with pytest.raises(UserError, match=problem):
            export(*arguments)
        assert not (tmp_path / "x").exists()

    began = run_of(sources["clip"], tmp_path / "run", LOSSES["clip"])
    refused("^--as is 'siglip', and the run's student began as clip", began, tmp_path / "x",
            "--as", "siglip")  # fmt: skip
    refused("began as two encoders", run, tmp_path / "x", "--as", "clip")
    even = run_of(clip(tmp_path / "even", text_width=32), tmp_path / "run2", LOSSES["clip"], shared_blocks=1)
    refused("its models have no shared blocks, and the student has 1", even, tmp_path / "x", "--as", "clip")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_interpolated_it_is_between_the_source_and_the_trained_weights(kind, sources, tmp_path):
    run = run_of(sources[kind], tmp_path / "run", LOSSES[kind])
    between = {}
    for share in ("0", "0.25", "1"):
        folder = export(run, tmp_path / share, "--as", kind, "--interpolate", share)
        between[share] = load_file(folder / "model.safetensors") | load_file(folder / TOKENS)
    export(run, tmp_path / "plain", "--as", kind)
    source, plain = (load_file(folder / "model.safetensors") for folder in (sources[kind], tmp_path / "plain"))
    for name, value in between["0.25"].items():
        ends = between["0"][name], between["1"][name]
        torch.testing.assert_close(value, 0.75 * ends[0] + 0.25 * ends[1])
        assert name not in plain or (torch.equal(ends[0], source[name]) and torch.equal(ends[1], plain[name]))
    own = export(run, tmp_path / "own", "--interpolate", "0.25")
    name = "student.text.token_head.weight"
    assert torch.equal(load_file(own / "model.safetensors")[name], between["0.25"]["text.weight"])
    assert "0.25 of the way from student.source to the weights" in (own / "README.md").read_text()


def test_without_a_source_nothing_is_interpolated(sources, run, tmp_path):
    with pytest.raises(UserError, match=r"^--interpolate has no effect: the run has no student.source, [^\n]*$"):
        export(run, tmp_path / "x", "--interpolate", "0.5")
    began = run_of(shutil.copytree(sources["clip"], tmp_path / "gone"), tmp_path / "run", LOSSES["clip"])
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(UserError, match=r"^student.source is [^\n]*: no such file or folder$"):
        export(began, tmp_path / "x", "--interpolate", "0.5")


def test_a_run_and_its_export_start_a_training(sources, tmp_path, pictures):
    run = run_of(sources["clip"], tmp_path / "run", LOSSES["clip"])
    own = export(run, tmp_path / "own")
    wanted = Model.load(run, device="cpu")
    pixels = torch.stack([wanted.read(picture) for picture in pictures])
    for place in (run, own, run / "student.safetensors"):
        objective, config, _ = start(place, {"global": 1.0, "cmli": 1.0}, freeze_text=1)
        with torch.no_grad():
            cls, _ = objective.student.image_embeddings(pixels)
        assert torch.equal(cls, wanted.embed_images(pictures).cls)
        assert objective.scales()["global"] == pytest.approx(wanted.objective.scales()["global"])
        assert config.student.freeze_text == 1 and config.student.embed_dim == 24
    with pytest.raises(UserError, match="no such file or folder"):
        start(run / "student_ema.safetensors", LOSSES["clip"])
    (run / "student.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^student.source [^\n]*cannot load"):
        start(run, LOSSES["clip"])


def test_any_of_them_is_evaluated(sources, tmp_path, capsys, monkeypatch):
    from tests.make import pairs

    process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**process, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    data = pairs(tmp_path / "pairs", count=12)
    out = tmp_path / "metrics.json"
    evaluate.main([str(sources["siglip"]), "--data", data, "--json", str(out)], standalone_mode=False)
    metrics = json.loads(out.read_text())
    assert metrics["eval/val/pairs"] == 12 and "eval/val/cmli/mean_recall" in metrics
    with pytest.raises(UserError, match="is no run, which has averages and data of its own: give --data"):
        evaluate.main([str(sources["siglip"])], standalone_mode=False)
    with pytest.raises(UserError, match="MODEL or --checkpoint: none is given"):
        evaluate.main(["--data", data], standalone_mode=False)
