import json

from transformers import PreTrainedTokenizerFast

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.tokens import builtin_tokenizer, tokenizer_of
from tests import make


def load(name, length=12):
    return tokenizer_of(DataConfig(tokenizer=name, context_length=length))


def test_special_tokens_are_not_valid():
    builtin = load("builtin")
    tokens = builtin("Red apple")
    assert builtin.backend.decode(tokens.input_ids, skip_special_tokens=False) == "[CLS] red apple [SEP]"
    assert tokens.valid == [False, True, True, False]
    assert tokens.offsets[1:3] == [(0, 3), (4, 9)]
    assert builtin("red [SEP] apple [PAD]").valid == [False, True, False, True, False, False]
    assert builtin("\u200b").valid == [False, False]
    assert builtin("red " * 40).valid == [False] + [True] * 10 + [False]  # which cutting off keeps
    assert builtin("red  apple").spans == [(0, 3), (5, 10)]  # without the blanks before a word


def save(folder, change, **tokens):
    """Save the built-in tokenizer with another tokenizer.json, of a class that reads all of it."""
    fast = PreTrainedTokenizerFast(tokenizer_object=builtin_tokenizer().backend_tokenizer, **tokens)
    fast.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def gap(content):
    content["model"]["vocab"]["[UNK]"] = 10**8
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNK]"]


DAMAGES = {  # of a tokenizer.json
    "far": lambda content: content["post_processor"]["special_tokens"]["[SEP]"].update(ids=[10**6]),
    "many": lambda content: content["post_processor"]["single"].extend(12 * content["post_processor"]["single"][-1:]),
    "thrice": lambda content: content["post_processor"].update(single=3 * content["post_processor"]["single"]),
    "gap": gap,
    "empty": dict.clear,
}


def test_a_tokenizer_that_cannot_serve_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    without_padding = save(tmp_path / "without a padding or end token", lambda content: None)
    damaged = [save(tmp_path / name, damage, pad_token="[PAD]") for name, damage in DAMAGES.items()]
    for name in (*damaged, without_padding, "no/such-model", "/dev/null"):
        assert "data.tokenizer is " in make.refused(load, name), name


def test_a_caption_that_cannot_be_split_is_one_line(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load(save(tmp_path, lambda content: content.update(pre_tokenizer=split), pad_token="[PAD]"))
    assert "cannot split" in make.refused(tokenizer, "a" * 4998 + "!")


def test_open_clips_tokenizer_tells_where_words_stand():
    text = "A Red  apple, isn't it?"
    assert [text[a:b] for a, b in load("open_clip", 77)(text).spans][:4] == ["A", "Red", "apple", ","]
