"""A sentence encoder by sentence-transformers' own Trainer and ranking loss: sentence-transformers 6.2.0."""

import subprocess
import sys
import tempfile

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer

MAKE = """
import sys
from transformers import BertConfig, BertModel, BertTokenizer
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(5000))]
open(sys.argv[1] + "/vocab.txt", "w").write("\\n".join(words))
BertTokenizer(sys.argv[1] + "/vocab.txt").save_pretrained(sys.argv[1])
BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=4)).save_pretrained(sys.argv[1])
"""
with tempfile.TemporaryDirectory() as folder:  # a model of random weights, as no hub is used
    subprocess.run([sys.executable, "-c", MAKE, folder], check=True)
    encoder = Transformer(folder, max_seq_length=64)
model = SentenceTransformer(modules=[encoder, Pooling(768)])
sentences = [" ".join(f"word{number + place}" for place in range(40)) for number in range(256)]
data = Dataset.from_dict({"anchor": sentences, "positive": sentences})
arguments = SentenceTransformerTrainingArguments(
    "/tmp/fits-sentences",
    per_device_train_batch_size=32,
    bf16=True,
    report_to=[],
    save_strategy="no",
)
SentenceTransformerTrainer(model, arguments, data, loss=MultipleNegativesRankingLoss(model)).train()
