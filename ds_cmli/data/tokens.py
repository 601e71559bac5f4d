"""Tokenising captions: which tokenizer, which of its tokens count, and where in the caption each one comes from."""

import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.data import assets

WORDS = Path(__file__).with_name("words.txt")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class Tokens:
    """One tokenised caption, M_j + special tokens long."""

    input_ids: list[int]
    valid: list[bool]  # False for [CLS], [SEP] and the like: they are no tokens of the caption
    ends: list[int]  # the caption's character after the token's last (a start may count the blank before it)


@dataclass(frozen=True)
class SpecialTokens:
    """What a text encoder must know of the tokens that a tokenizer adds; the defaults are the built-in one's."""

    pad_id: int = 0
    class_first: bool = True  # a text begins with a token that is none of the caption's


class CaptionTokenizer:
    """A transformers tokenizer reduced to what pairs need: truncating, and telling valid tokens.

    Attributes: `vocab_size` (ids are below it), `pad_id`, `positions` (the longest result, special tokens included).
    """

    def __init__(self, tokenizer, positions: int):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Padding is known by its mask: causal models, which have no token for it, take the one of the end.
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if backend is None or pad_id is None:
            lacks = "fast version (tokenizer.json)" if backend is None else "token for padding or the end"
            raise UserError(f"data.tokenizer is {tokenizer.name_or_path!r}, which has no {lacks}: choose one that has")
        # A copy: transformers changes truncation and padding of its own at every call.
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_padding()
        self.backend.enable_truncation(positions)
        self.positions = positions
        self.vocab_size = len(tokenizer)
        self.pad_id: int = pad_id
        self.unknown_id = tokenizer.unk_token_id
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        # By id too: "[SEP]" written out in a caption becomes the special token without being marked as one.
        self.special_ids = {self.pad_id, *(i for i in ids if i is not None)}

    @property
    def special(self) -> SpecialTokens:
        """Of the captions that it makes."""
        valid = self("a").valid
        return SpecialTokens(self.pad_id, class_first=bool(valid) and not valid[0])

    def __call__(self, text: str) -> Tokens:
        encoding = self.backend.encode(text)
        ids = encoding.ids
        added = encoding.special_tokens_mask
        valid = [not a and i not in self.special_ids for i, a in zip(ids, added, strict=True)]
        return Tokens(ids, valid, [end for _, end in encoding.offsets])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each position: the first character of the text that it stands for, and the one after the last."""
        out = []
        for start, end in self.backend.encode(text).offsets:
            piece = text[start:end]  # some tokenizers count the blank before a word to it
            out.append((start + len(piece) - len(piece.lstrip()), end))
        return out

    def mostly_unknown(self, text: str) -> bool:
        """Whether more than half of the caption's tokens stand for something that the vocabulary does not have."""
        tokens = self(text)
        valid = [i for i, v in zip(tokens.input_ids, tokens.valid, strict=True) if v]
        return 2 * valid.count(self.unknown_id) > len(valid)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)


def load_tokenizer(name: str, positions: int) -> CaptionTokenizer:
    """The tokenizer of `DataConfig.tokenizer`, its results at most `positions` (M) long.

    "demo": MiniLM's (fetched); "builtin": see `builtin_tokenizer`; otherwise a transformers name or a local path.

    Raises:
        UserError: it cannot be loaded, has no fast version or no [PAD] token.
    """
    return CaptionTokenizer(pretrained_tokenizer(name), positions)


def pretrained_tokenizer(name: str) -> Any:
    """The same as transformers has it. Raises `UserError` where it cannot be loaded."""
    # Captions are short and come one at a time; threads would only warn and hang in forked loading processes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if name == "builtin":
        return builtin_tokenizer()
    from transformers import AutoTokenizer

    path = assets.minilm() if name == "demo" else Path(name).expanduser()
    local = path.exists()
    try:
        with loading(hub=not local):
            tokenizer = AutoTokenizer.from_pretrained(
                str(path) if local else name, local_files_only=local, trust_remote_code=False
            )
    except Exception as error:  # the hub's client, transformers and tokenizers each raise their own kinds
        raise UserError(
            f"data.tokenizer is {name!r}, which cannot be loaded ({reason(error)}): "
            "give 'demo', 'builtin', a transformers name or a local folder"
        ) from None
    return tokenizer


def builtin_tokenizer():
    """A lower-case WordPiece tokenizer that needs no download, as a transformers `PreTrainedTokenizerFast`.

    Vocabulary: the special tokens, every printable ASCII character alone and as a ## continuation, and the words of
    the demo pictures' names (`words.txt`). Other ASCII words fall into characters, anything else into [UNK].
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = WORDS.read_text(encoding="utf-8").split()
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters), *(w for w in words if w not in characters)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="builtin", **named)
