"""Tokenizers of open_clip's models as fast ones of transformers, with the same ids.

open_clip cleans a text before it splits it (ftfy, HTML's entities, blanks, case), which no file of
a tokenizer can say. How is kept under `OWN` in the tokenizer's `init_kwargs`, which its files hold.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading
from ds_cmli.config.open_clip import DEFAULT_TOKENIZER, LOCAL, NAMED, is_marked

if TYPE_CHECKING:
    from open_clip import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

OWN = "open_clip"
# The words of open_clip's `SimpleTokenizer`: after these, letters, one digit, other characters.
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WINDOW = 64  # characters among which that of a cleaned text is looked for
WAYS = ("lower", "whitespace", "canonicalize")  # of cleaning


def is_own(name: str) -> bool:
    """Whether `data.tokenizer` names a tokenizer of open_clip."""
    return name == DEFAULT_TOKENIZER or is_marked(name)


def load(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer that open_clip has for a model, or its default one.

    Raises:
        UserError: it takes texts in a way that is not supported.
        Exception: those of the libraries, if there is none.
    """
    import open_clip
    from open_clip.tokenizer import get_clean_fn

    model = "" if name == DEFAULT_TOKENIZER else name.removeprefix(NAMED)
    with loading(hub=not name.startswith(LOCAL)):
        given: Any = open_clip.get_tokenizer(model)
    shortens = getattr(given, "reduction_fn", None) is not None
    if shortens or getattr(given, "tokenizer_mode", None):
        raise UserError(
            f"data.tokenizer is {name!r}, which shortens or marks texts in a way of its own: give "
            "a model with another tokenizer"
        )
    cleans = list(map(get_clean_fn, WAYS))
    own: JsonObject = {"clean": WAYS[cleans.index(given.clean_fn)]}
    if isinstance(given, open_clip.SimpleTokenizer):
        return _of_simple(given, own)
    return _of_library(given, own)


def _of_simple(given: "SimpleTokenizer", own: JsonObject) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    start, end = (given.decoder[i] for i in (given.sot_token_id, given.eot_token_id))
    merges = sorted(given.bpe_ranks, key=given.bpe_ranks.get)
    # The table ends with an empty line, which is no merge.
    merges = [merge for merge in merges if len(merge) == 2]
    backend = Tokenizer(models.BPE(given.encoder, merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_words()), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ends = [(start, given.sot_token_id), (end, given.eot_token_id)]
    backend.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=ends)
    # Padding is the id 0, which is a token of the vocabulary too.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        name_or_path=DEFAULT_TOKENIZER,
        **{OWN: own | {"pad_id": 0}},
    )


@cache
def _words() -> str:
    """Open_clip's regular expression, its classes written out: tokenizers has an older Unicode."""
    import regex

    every = "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))
    classes = []
    for kind in (r"\p{L}", r"\p{N}", r"^\s\p{L}\p{N}"):
        ranges = []
        for match in regex.finditer(f"[{kind}]+", every, regex.IGNORECASE):
            ranges.append(rf"\x{{{ord(match[0][0]):X}}}-\x{{{ord(match[0][-1]):X}}}")
        classes.append(f"[{''.join(ranges)}]")
    letters, digits, others = classes
    return f"{ENDINGS}|{letters}+|{digits}|{others}+"


def _of_library(given: "HFTokenizer", own: JsonObject) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    whole: Any = given.tokenizer
    backend = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    if given.strip_sep_token:  # its place is filled with padding, of the id 0
        first, pad = whole.cls_token, whole.convert_ids_to_tokens(0)
        backend.post_processor = processors.TemplateProcessing(
            f"{first} $A {pad}", special_tokens=[(first, whole.cls_token_id), (pad, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=whole.name_or_path,
        **whole.special_tokens_map,
        **{OWN: own},
    )


def own_of(tokenizer: "PreTrainedTokenizerBase") -> JsonObject:
    """What a tokenizer does as open_clip's, with `clean` and maybe `pad_id`; {} for any other."""
    return getattr(tokenizer, "init_kwargs", {}).get(OWN) or {}


@dataclass(frozen=True)
class Cleaning:
    """How open_clip cleans a text before it is split."""

    way: str  # of `WAYS`

    @classmethod
    def of(cls, own: JsonObject) -> "Cleaning | None":
        """That of `own_of`; None: texts are split as they are.

        Raises:
            UserError: open_clip is not installed.
        """
        if not own:
            return None
        if find_spec("open_clip") is None:
            raise UserError(
                "data.tokenizer cleans texts by open_clip, which is not installed: "
                "pip install 'ds-cmli[open_clip]'"
            )
        return cls(own["clean"])

    def __call__(self, text: str) -> str:
        return _clean_function(self.way)(text)

    @staticmethod
    def places(text: str, cleaned: str) -> list[int] | None:
        """Where in `text` each character of `cleaned`, and its end, is; None: at the same place.

        A character that cleaning has made of others is where the next one after the last found is.
        """
        lower = text.lower()
        if cleaned in (text, lower):
            return None
        out, place = [], 0
        for character in cleaned.lower():
            start = lower.find(character, place, place + WINDOW)
            place = max(place, start)
            out.append(min(place, len(text)))
            place += start >= 0
        return [*out, min(place, len(text))]


@cache
def _clean_function(way: str) -> Callable[[str], str]:
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn(way)
