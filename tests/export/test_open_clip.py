"""A student that began as a model of open_clip is one of it again: `--as open_clip`."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ds_cmli.common.errors import UserError
from ds_cmli.export.library import TOKENS
from ds_cmli.inference import Model
from tests.export.libraries import TEXTS, after_ten_steps, export, run_of
from tests.models.dual_models import start

open_clip = pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")
from tests.models.open_clip_models import losses, saved  # noqa: E402

KINDS = ("vit", "convnext", "coca", "siglip", "roberta")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("open_clip")
    return {kind: saved(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "roberta")) for kind in KINDS])
def test_untrained_its_weights_are_the_sources_to_the_bit(kind, folders, tmp_path):
    given = folders[kind]
    run = run_of(given, tmp_path / "run", losses(given), trained=False)
    folder = export(run, tmp_path / "back", "--as", "open_clip")
    source, back = load_file(given / WEIGHTS), load_file(folder / WEIGHTS)
    towers = {key for key in source if not key.startswith("text_decoder.")}
    assert towers == back.keys() and (towers == source.keys()) == (kind != "coca")
    assert all(torch.equal(source[key], back[key]) for key in back)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", KINDS)
def test_after_ten_steps_the_library_computes_its_features(kind, folders, tmp_path, pictures):
    given = folders[kind]
    run = after_ten_steps(given, tmp_path / "run", losses(given))
    folder = export(run, tmp_path / "back", "--as", "open_clip")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    ours, words = Model.load(run, device="cpu"), open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = F.normalize(theirs.eval().encode_image(torch.stack(list(map(transform, pictures)))))
        texts = F.normalize(theirs.encode_text(words(TEXTS)))
    torch.testing.assert_close(ours.embed_images(pictures).cls, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_texts(TEXTS).cls, texts, rtol=0, atol=1e-5)
    assert ours.objective.score_scales()["global"] == pytest.approx(theirs.logit_scale.exp().item())
    maps, own = load_file(folder / TOKENS), ours.student.image.token_head.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(maps[f"image.{name}"], value) for name, value in own.items())


@pytest.mark.slow
def test_an_export_of_this_package_needs_nothing_of_the_source(folders, tmp_path, pictures):
    run = run_of(folders["coca"], tmp_path / "run", losses(folders["coca"]))
    wanted = Model.load(run, device="cpu")
    own = export(run, tmp_path / "own")
    result = Model.load(own, device="cpu")
    texts = ["Two  &amp; DOGS"]
    assert torch.equal(result.embed_images(pictures).cls, wanted.embed_images(pictures).cls)
    assert torch.equal(result.embed_texts(texts).tokens, wanted.embed_texts(texts).tokens)
    assert result.tokenizer(texts[0]) == wanted.tokenizer(texts[0])
    objective, config, _ = start(own, {"global": 1.0, "cmli": 1.0})
    assert config.data.padding == "full" and objective.student.image.grid == (4, 4)


def test_what_it_is_not_is_refused(folders, tmp_path):
    run = run_of(folders["roberta"], tmp_path / "run", losses(folders["roberta"]), trained=False)
    with pytest.raises(UserError, match=r"^--as is 'clip', and the run's student began as open_clip"):
        export(run, tmp_path / "x", "--as", "clip")
    run = run_of(folders["roberta"], tmp_path / "run2", losses(folders["roberta"]), trained=False, shared_blocks=1)
    with pytest.raises(UserError, match="its models have no shared blocks, and the student has 1"):
        export(run, tmp_path / "x", "--as", "open_clip")
    assert not (tmp_path / "x").exists()
