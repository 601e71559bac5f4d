"""Uses a trained student: embeddings, scores and matches of words and patches.

from ds_cmli.inference import Model

model = Model.load("runs/demo-20260101-000000")
images, texts = model.embed_images("pictures/"), model.embed_texts(["a red car"])
model.scores(images, texts)["combined"].t2i  # [I, J], ranks images for a text; i2t: texts
"""

from ds_cmli.inference.model import ImageEmbeddings, Model, TextEmbeddings
from ds_cmli.scores import Match

__all__ = ["ImageEmbeddings", "Match", "Model", "TextEmbeddings"]
