import json
import time

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.data.tokens import SPECIAL, builtin_tokenizer, load_tokenizer, most_characters, tell_cut


@pytest.fixture(scope="module")
def builtin():
    return load_tokenizer("builtin", 12)


def test_special_tokens_are_not_valid(builtin):
    tokens = builtin("Red apple")
    assert builtin.backend.decode(tokens.input_ids, skip_special_tokens=False) == "[CLS] red apple [SEP]"
    assert tokens.valid == [False, True, True, False]
    assert tokens.ends[1:3] == [3, 9]


def test_special_tokens_written_in_a_caption_are_not_valid(builtin):
    tokens = builtin("red [SEP] apple [PAD]")
    assert [builtin.backend.id_to_token(i) for i, v in zip(tokens.input_ids, tokens.valid, strict=True) if v] == [
        "red",
        "apple",
    ]


def test_truncation_keeps_the_special_tokens(builtin):
    tokens = builtin("red " * 40)
    assert len(tokens.input_ids) == 12
    assert tokens.valid == [False] + [True] * 10 + [False]


def test_builtin_vocabulary():
    tokenizer = builtin_tokenizer()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == list(SPECIAL)
    assert tokenizer.tokenize("Apple xq9! piñata") == ["apple", "x", "##q", "##9", "!", "pinata"]
    assert tokenizer.tokenize("\u4e2d") == ["[UNK]"]


def test_a_caption_of_nothing_has_no_valid_token(builtin):
    assert builtin("\u200b").valid == [False, False]


def test_a_saved_tokenizer_loads_by_its_path(tmp_path, builtin):
    builtin_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), 12)
    assert loaded("cat face").input_ids == builtin("cat face").input_ids
    assert (loaded.vocab_size, loaded.pad_id) == (builtin.vocab_size, 0)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer is '.*', which cannot be loaded") as error:
        load_tokenizer(str(tmp_path), 12)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    tokenizer = builtin_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"which has no token for padding or the end"):
        load_tokenizer(str(tmp_path), 12)


ORDINARY = ["red apple " * 6000, "a" * 90_000, "x" * 200 + " red", "\u4e2d\u6587 " * 9000, " " * 300 + "red apple"]


@pytest.mark.parametrize("positions", [12, 64, 2048])
@pytest.mark.parametrize("text", ORDINARY, ids=range(len(ORDINARY)))
def test_a_limit_of_characters_changes_no_tokens(positions, text):
    tokenizer = load_tokenizer("builtin", positions)
    whole = tokenizer.backend.encode(text)
    assert tokenizer(text).input_ids == whole.ids
    assert len(tokenizer.spans(text)) == len(whole.ids)


def test_of_a_text_of_megabytes_only_the_beginning_is_tokenised(builtin):
    text = "red apple " * 5_000_000  # 50 MB: 2 minutes as a whole
    started = time.monotonic()
    assert builtin(text).valid == [False] + [True] * 10 + [False]
    assert len(builtin.spans(text)) == 12
    assert not builtin.mostly_unknown(text)
    assert time.monotonic() - started < 20
    line = "1 of 2 texts have up to 50,000,000 characters: only the first 65,536 are read"
    assert tell_cut([text, "red"], 12) == line
    assert tell_cut(["red " * 16_384], 12) is None
    assert most_characters(65_536) == 64 * 65_536


def changed_tokenizer(folder, change):
    builtin_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("every", [False, True])
def test_ids_with_gaps_of_millions_are_one_line(every, tmp_path):
    def change(content):
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {k: v + 10**9 * (every or k == "dog") for k, v in vocabulary.items()}

    with pytest.raises(UserError, match=r"whose ids go up to 1,000,\d{3},\d{3} for 1,\d{3} tokens: choose"):
        load_tokenizer(changed_tokenizer(tmp_path, change), 16)


def test_ids_with_few_gaps_are_below_the_size(tmp_path):
    def change(content):
        content["model"]["vocab"]["dog"] = 5000

    tokenizer = load_tokenizer(changed_tokenizer(tmp_path, change), 16)
    assert max(tokenizer("a dog").input_ids) == 5000 < tokenizer.vocab_size == 5001


def test_a_regular_expression_that_explodes_is_one_line(tmp_path, capfd):
    def change(content):
        content["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
        }  # fmt: skip

    tokenizer = load_tokenizer(changed_tokenizer(tmp_path, change), 16)
    assert tokenizer("dog").input_ids
    for read in (tokenizer, tokenizer.spans, tokenizer.mostly_unknown):
        with pytest.raises(UserError, match=r"cannot split 'aaaa.*' \(5001 characters\) \(Onig.*\): choose another"):
            read("a" * 4998 + "!")
