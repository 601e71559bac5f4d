"""SigLIP's tokenizer of a `spiece.model` as one of the library tokenizers.

These truncate, and know where words end. transformers reads the file by the library sentencepiece.
"""

import re
import string
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ds_cmli.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BLANK = "\u2581"  # sentencepiece's mark of a word's beginning
TRIED = (
    "",
    "a red car",
    "A photo of 2 dogs, sitting  under the tree's top.",
    "  \ttwo\nlines - and (brackets)!  ",
    "caf\u00e9 \u4e2d\u6587 \u2581 \u00bd \uff21",
)


def is_siglip(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return type(tokenizer).__name__ == "SiglipTokenizer" and hasattr(tokenizer, "sp_model")


def converted(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerFast":
    """The same tokenizer with a backend: equal ids for each of `TRIED` and for pairs of pieces.

    Raises:
        UserError: it is no unigram model, or gives other ids.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import import_protobuf

    slow: Any = tokenizer
    pieces, proto = slow.sp_model, import_protobuf().ModelProto()
    proto.ParseFromString(pieces.serialized_model_proto())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id()))
    steps: list[Any] = [normalizers.Replace(BLANK, " ")]
    if slow.do_lower_case:
        steps.append(normalizers.Lowercase())
    steps.append(normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""))
    steps.append(normalizers.Replace(Regex(r"\s+"), " "))
    if characters := proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(characters))
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(BLANK, prepend_scheme="always", split=False)
    end = slow.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, slow.eos_token_id)]
    )
    words = [pieces.id_to_piece(i).replace(BLANK, " ") for i in range(3, len(pieces), 97)]
    for text in (*TRIED, *(first + second for first, second in pairwise(words))):
        if backend.encode(text).ids != slow(text)["input_ids"]:
            raise UserError(
                f"data.tokenizer is {slow.name_or_path!r}: its spiece.model cannot be converted, "
                f"as {text!r} would be split otherwise: give a tokenizer with a tokenizer.json"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=slow.name_or_path,
        eos_token=end,
        pad_token=slow.pad_token,
        unk_token=slow.unk_token,
    )
