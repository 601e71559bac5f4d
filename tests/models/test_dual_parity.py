"""The first step equals the source in its real sizes: features, scores and recall on 200 pairs, random weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from ds_cmli.data.aspect import laid_out
from ds_cmli.data.batch import Collate, Sample, stack_grids
from ds_cmli.data.pictures import prepare
from ds_cmli.data.tokens import WORDS as FILE
from ds_cmli.data.transforms import Framing
from ds_cmli.evaluate import recalls
from tests.models import dual_models

pytestmark = pytest.mark.soak
WORDS = FILE.read_text("utf-8").split()
PAIRS = 200
SIZE = {"height": 224, "width": 224}


def clip(width: int, depth: int, patch: int, words: int, embed: int):
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64,
              "intermediate_size": 4 * width, "patch_size": patch, "image_size": 224}  # fmt: skip
    text = dual_models.text(hidden_size=words, num_hidden_layers=12, num_attention_heads=words // 64,
                            intermediate_size=4 * words, max_position_embeddings=77)  # fmt: skip
    model = CLIPModel(CLIPConfig(projection_dim=embed, vision_config=vision, text_config=text))
    return model, CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=SIZE)


def siglip():
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    vision = {**sizes, "patch_size": 16, "image_size": 224}
    text = dual_models.text(**sizes, max_position_embeddings=64, projection_size=768)
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text)), SiglipImageProcessor(size=SIZE)


def naflex():
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    text = {**sizes, "vocab_size": 400, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return Siglip2Model(Siglip2Config(vision_config=sizes, text_config=text)), Siglip2ImageProcessor()


MODELS = {
    "clip B/32": lambda: clip(768, 12, 32, 512, 512),
    "clip B/16": lambda: clip(768, 12, 16, 512, 512),
    "clip L/14": lambda: clip(1024, 24, 14, 768, 768),
    "siglip B/16": siglip,
    "siglip 2 NaFlex B/16": naflex,
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_its_source_on_200_pairs(name, tmp_path):
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    torch.nn.init.constant_(model.logit_scale, 4.5)
    own_words = dual_models.characters("right") if "NaFlex" in name else None
    folder = dual_models.saved(tmp_path / "model", model, processor, own_words)
    del model
    losses = {"global_sigmoid" if "siglip" in name else "global": 1.0, "cmli": 1.0}
    objective, config, words = dual_models.start(folder, losses)
    theirs = AutoModel.from_pretrained(folder).eval()
    own_processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    noise, framing = np.random.default_rng(0), Framing.of(config.data)
    results, wanted = [], []
    for first in range(0, PAIRS, 8):
        pictures = []
        for side in noise.integers(100, 500, (8, 2)):
            coarse = noise.integers(0, 256, (9, 7, 3), np.uint8)
            pictures.append(Image.fromarray(coarse).resize(tuple(side)))
        texts = [" ".join(noise.choice(WORDS, 3 + (first + n) % 60)) for n in range(8)]
        prepared = [prepare(picture, framing) for picture in pictures]
        shown = [laid_out(image, config.data.aspect_patch, config.data.image_size) for image in prepared]
        pixels, grid = torch.stack([image for image, _ in shown]), stack_grids([grid for _, grid in shown])
        batch = Collate(words)([Sample(pixels[0], words(text), 0, 0) for text in texts])
        cls, _ = objective.student.image_embeddings(pixels, grid)
        text_cls, _ = objective.student.text_embeddings(batch.input_ids, batch.attention_mask)
        results.append((cls, text_cls))
        full = tokenizer(texts, padding="max_length", truncation=True, max_length=config.data.context_length,
                         return_tensors="pt")  # fmt: skip
        if "siglip" in name:
            full.pop("attention_mask", None)
        full.pop("token_type_ids", None)
        inputs = own_processor(images=pictures, return_tensors="pt")
        of_images, of_texts = theirs.get_image_features(**inputs), theirs.get_text_features(**full)
        wanted.append((F.normalize(of_images.pooler_output), F.normalize(of_texts.pooler_output)))
    mine, own = ([torch.cat(part) for part in zip(*pairs, strict=True)] for pairs in (results, wanted))
    difference = (mine[0] @ mine[1].T - own[0] @ own[1].T).abs().max().item()
    print(f"{name}: cosines differ by at most {difference:.1e}")
    assert difference < 1e-5
    assert objective.score_scales()["global"] == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-6)
    image_of = torch.arange(PAIRS)
    first, second = (recalls(x @ y.T, x @ y.T, image_of) for x, y in (mine, own))
    assert first == second
