"""open_clip's tokenizers as fast ones: the same ids, and the places in the text as it was written."""

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.data.tokens import CaptionTokenizer, load_tokenizer, pretrained_tokenizer

open_clip = pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")

TEXTS = [
    "a red car",
    "Hello!!  WORLD?! it's we're I'm",
    "cafe\u0301 \u2019s \uff21 &amp; &lt;b&gt; x\u00b2 \u00bd \ufb01ne",
    "\u00c3\u00a9t\u00e9",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u039f\u0394\u039f\u03a3 \u0130stanbul \U0001f600\U0001f603",
    "\U0001e4d0\U0001e4d1 a\U00011f04b \U0001fae9! \U00011f50",  # of Unicode 15 and 16
    "3.14159 1st! a_b-c/d\\e",
    "tab\tand\nline  ",
    "\x00\x1b[31mred",
    "a <end_of_text> inside",
    "long " * 200,
    "",
]


def padded(words, text):
    ids = words(text).input_ids
    return ids + [words.pad_id] * (words.positions - len(ids))


def test_the_ids_are_its_own(tmp_path):
    theirs, given = open_clip.SimpleTokenizer(), pretrained_tokenizer("open_clip")
    given.save_pretrained(tmp_path / "saved")
    for tokenizer in (given, pretrained_tokenizer(str(tmp_path / "saved"))):
        words = CaptionTokenizer(tokenizer, 77)
        for text in TEXTS:
            assert padded(words, text) == theirs(text)[0].tolist(), text
    assert words.vocab_size == 49408 and words.pad_id == 0 and words.special.class_first


def test_the_ids_of_a_tokenizer_of_transformers(tmp_path):
    import json

    from ds_cmli.data.tokens import builtin_tokenizer

    builtin_tokenizer().save_pretrained(tmp_path)
    for more in ({}, {"clean": "canonicalize"}, {"strip_sep_token": True}):
        text = {"hf_tokenizer_name": "any", "context_length": 32, "tokenizer_kwargs": more}
        config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        theirs, words = open_clip.get_tokenizer(f"local-dir:{tmp_path}"), load_tokenizer(f"local-dir:{tmp_path}", 32)
        for caption in TEXTS:
            assert padded(words, caption) == theirs(caption)[0].tolist(), (more, caption)


def test_places_are_those_of_the_text_as_it_was_written():
    words = load_tokenizer("open_clip", 77)
    text = "Two  &amp; DOGS,   sitting\u2019s \ufb01ne"
    pieces = [text[start:end] for start, end in words.spans(text)]
    assert pieces == ["", "Two", "&amp;", "DOGS", ",", "sitting", "\u2019s", "\ufb01ne", ""]
    tokens = words(text)
    assert tokens.text == text and [text[end - 1] for end in tokens.ends[1:5]] == ["o", ";", "S", ","]


def test_a_way_that_is_not_supported_is_one_line(tmp_path):
    import json

    text = {"tokenizer_kwargs": {"reduction_mask": "random"}}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^data.tokenizer is [^\n]* shortens or marks texts [^\n]*$"):
        load_tokenizer(f"local-dir:{tmp_path}", 32)
    with pytest.raises(UserError, match=r"^data.tokenizer is [^\n]*, which open_clip cannot load [^\n]*$"):
        load_tokenizer("local-dir:nowhere", 32)
