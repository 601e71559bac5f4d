"""SigLIP's tokenizer of a spiece.model, trained here, gives the same ids by the library tokenizers."""

import json
import random

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import reason
from ds_cmli.data.tokens import WORDS, load_tokenizer, pretrained_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    folder, draw = tmp_path_factory.mktemp("siglip"), random.Random(0)
    words = WORDS.read_text("utf-8").split()
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(2000)]
    (folder / "text").write_text("\n".join(lines))
    library.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=400, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    return folder


def test_it_gives_the_same_ids(folder):
    slow, fast, words = (
        AutoTokenizer.from_pretrained(folder),
        pretrained_tokenizer(str(folder)),
        WORDS.read_text("utf-8"),
    )
    own, draw = load_tokenizer(str(folder), 64, full=True), random.Random(1)
    for _ in range(200):
        text = "".join(
            draw.choices([*words.split(), " ", "  ", "A", ",", "'", "-", "\t", "\u00e9", "\u00bd", "\u4e2d", "7"], k=9)
        )
        wanted = slow(text)["input_ids"]
        assert fast(text)["input_ids"] == wanted
        assert own(text).input_ids == wanted[:63] + wanted[-1:] if len(wanted) > 64 else wanted
    assert own.pad_id == slow.pad_token_id and own("A red car").valid[-1] is False


def test_other_pieces_are_refused(folder, monkeypatch):
    monkeypatch.setattr("ds_cmli.data.sentencepiece_tokens.normalizers.Lowercase", normalizers.Strip)
    with pytest.raises(UserError, match=r"its spiece.model cannot be converted, as [^\n]*: give a tokenizer with"):
        pretrained_tokenizer(str(folder))


def test_without_the_library_it_is_one_line():
    error = ImportError(
        "\nSiglipTokenizer requires the SentencePiece library but it was not found in your environment."
    )
    assert reason(error) == "its spiece.model needs `pip install sentencepiece protobuf`"
