"""An exported model is the trained one, to the bit: loaded by transformers, and read back by this package."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from ds_cmli.common.errors import UserError
from ds_cmli.data.batch import Sample
from ds_cmli.data.tokens import builtin_tokenizer
from ds_cmli.inference import Model
from tests.export.conftest import TEXTS, export, make_run
from tests.ranks import clean_environment


@pytest.fixture(scope="module")
def trained(run):
    return Model.load(run, "cpu")


@pytest.fixture(scope="module")
def model(exported):
    return AutoModel.from_pretrained(exported)


@pytest.fixture(scope="module")
def inputs(exported, pictures):
    return AutoProcessor.from_pretrained(exported)(images=pictures, text=TEXTS)


@pytest.fixture(scope="module")
def batch(trained, pictures):
    samples = zip(pictures, TEXTS, strict=True)
    return trained.collate([Sample(trained.read(p), trained.tokenizer(t), i, i) for i, (p, t) in enumerate(samples)])


@torch.no_grad()
def test_inputs_and_features_are_those_of_the_training(trained, model, inputs, batch):
    assert torch.equal(inputs["pixel_values"], batch.image)
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    assert torch.equal(inputs["attention_mask"], batch.attention_mask)
    assert torch.equal(model.token_mask(inputs["input_ids"], inputs["attention_mask"]), batch.token_mask)
    student, g = trained.student, trained.student.projection
    image, text = model.get_image_features(inputs["pixel_values"]), model.get_text_features(inputs["input_ids"])
    for entry, (cls, tokens) in (
        (image, student.encode_image(batch.image)),
        (text, student.encode_text(batch.input_ids, batch.attention_mask)),
    ):
        assert torch.equal(entry.pooler_output, cls)
        assert torch.equal(entry.last_hidden_state, g(tokens))


@torch.no_grad()
def test_scores_and_loss_are_those_of_the_training(trained, model, inputs, batch, pictures):
    out = model(**inputs, return_loss=True)
    scores = trained.scores(trained.embed_images(pictures), trained.embed_texts(TEXTS))
    torch.testing.assert_close(out.logits_per_image, scores["combined"].i2t)
    torch.testing.assert_close(out.logits_per_text, scores["combined"].t2i.t())
    assert not torch.allclose(out.logits_per_text, out.logits_per_image.t())
    result = model.cmli_scores(out.patch_embeds, out.token_embeds, out.token_mask)
    torch.testing.assert_close(result, tuple(scores["cmli"]))
    torch.testing.assert_close(out.loss, trained.objective(batch)[0])
    alone = model(inputs["input_ids"][:1, :8], inputs["pixel_values"], inputs["attention_mask"][:1, :8])
    assert inputs["input_ids"].shape[1] > 8  # the padding that the longest text gives the others
    torch.testing.assert_close(alone.logits_per_text, out.logits_per_text[:1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(alone.logits_per_image, out.logits_per_image[:, :1], atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="3 images, 1 texts"):
        model(inputs["input_ids"][:1], inputs["pixel_values"], inputs["attention_mask"][:1], return_loss=True)


@torch.no_grad()
def test_it_loads_in_16_bits_and_saves_itself(model, exported, inputs, tmp_path):
    half = AutoModel.from_pretrained(exported, dtype=torch.bfloat16)
    assert half.scales() == model.scales() == model.to(torch.float32).scales()
    assert half.to(torch.float16).scales() == model.scales()
    half.to(torch.bfloat16)
    result = half.get_image_features(inputs["pixel_values"]).pooler_output
    assert result.dtype == torch.bfloat16
    wanted = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(result.float(), wanted, atol=0.1, rtol=0.1)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(again, wanted)


def test_matches_are_those_of_the_training(trained, model, pictures):
    entry, wanted = model.match(pictures[0], TEXTS[1]), trained.match(pictures[0], TEXTS[1])
    assert (entry.words, entry.spans, entry.grid) == (wanted.words, wanted.spans, wanted.grid)
    torch.testing.assert_close(entry.similarity, wanted.similarity)


def test_the_package_reads_it_back(trained, exported, pictures):
    again = Model.load(exported, "cpu")
    assert again.scales == trained.scales
    for embed, given, names in (
        ("embed_images", pictures, ("cls", "patches")),
        ("embed_texts", TEXTS, ("cls", "tokens", "token_mask")),
    ):
        entry, wanted = getattr(again, embed)(given), getattr(trained, embed)(given)
        assert all(torch.equal(getattr(entry, name), getattr(wanted, name)) for name in names)


LOADED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
folder, inputs_file, outputs_file = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(inputs_file)
with torch.no_grad():
    out = model(**inputs)
assert torch.equal(processor(text=%r)["input_ids"], inputs["input_ids"])
match = model.match(inputs["pixel_values"][0].permute(1, 2, 0).numpy(), "two dogs")
save_file({"similarity": match.similarity, **{k: out[k].contiguous() for k in out}}, outputs_file)
"""
MISSING = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "ds_cmli":
            raise ModuleNotFoundError("No module named 'ds_cmli'", name=name)
sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def run_code(code, tmp_path, *arguments):
    env = clean_environment() | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_transformers_loads_it_by_the_code_in_its_folder(model, exported, inputs, tmp_path):
    inputs_file, outputs_file = tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"
    save_file(dict(inputs), inputs_file)
    done = run_code(LOADED % (TEXTS,), tmp_path, exported, inputs_file, outputs_file)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = model(**inputs)
    outputs = load_file(outputs_file)
    # Threads differ, which must not matter in what one thread computes.
    for name in ("image_embeds", "text_embeds", "patch_embeds", "token_embeds"):
        torch.testing.assert_close(outputs[name], wanted[name], atol=1e-6, rtol=0)
    assert outputs["similarity"].shape[0] == 3  # two, dog, ##s


def test_without_the_package_the_error_names_it(exported, tmp_path):
    done = run_code(MISSING, tmp_path, exported)
    assert done.returncode == 1
    assert "ds_cmli" in done.stderr and "pip install ds_cmli" in done.stderr


def test_others_may_read_it(exported):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (exported, *exported.rglob("*")))


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}


@pytest.mark.parametrize(
    "student, losses",
    [
        ({"image_model": "eva02_tiny_patch14_224", "image_overrides": SMALL}, ("cmli",)),
        (
            {"image_model": "resnet18", "image_overrides": {"layers": [1, 1, 1, 1]}, "text_model": "clip",
             "text_overrides": BERT},
            ("cmli_sigmoid", "global_sigmoid"),
        ),
        (
            {"image_model": "swin_tiny_patch4_window7_224", "text_model": "t5", "text_overrides": T5,
             "image_overrides": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}},
            ("global",),
        ),
    ],
)  # fmt: skip
def test_backbones_of_all_kinds(student, losses, tmp_path):
    run = make_run(tmp_path / "run", student, losses, {"image_size": 64 if "resnet18" in student.values() else 56})
    folder = export(run, tmp_path / "model")  # which compares the features
    trained, again = Model.load(run, "cpu"), Model.load(folder, "cpu")
    assert torch.equal(trained.embed_texts(TEXTS).tokens, again.embed_texts(TEXTS).tokens)


@torch.no_grad()
def test_without_a_mask_a_texts_end_counts_that_is_also_the_padding(tmp_path):
    whole = builtin_tokenizer()
    whole.pad_token = "[SEP]"
    whole.save_pretrained(tmp_path / "words")
    run = make_run(tmp_path / "run", data={"tokenizer": str(tmp_path / "words")})
    folder = export(run, tmp_path / "model")
    model, inputs = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)(text=TEXTS)
    entry, wanted = model.get_text_features(inputs["input_ids"]), model.get_text_features(**inputs)
    assert torch.equal(entry.pooler_output, wanted.pooler_output)


def test_mistakes_are_one_line(run, exported, tmp_path):
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        export(run, exported)
    with pytest.raises(UserError, match=r"no config\.json there"):
        export(tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match="compare no pairs"):
        export(make_run(tmp_path / "taught", losses=("cls_kd",)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
