"""Tokenising captions: loading a tokenizer, and which tokens are valid and where they end."""

import os
import string
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Encoding, Tokenizer

from ds_cmli.common.errors import UserError, check_regular, one_line
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.config.schema import DataConfig
from ds_cmli.config.validation import shown
from ds_cmli.data import assets, open_clip_tokens, sentencepiece_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = Path(__file__).with_name("words.txt")
# So many characters of a text are tokenised, or `CHARACTERS_A_POSITION` for each position where
# that is more: 5 MB would take 10 s. Only a text whose first 65,536 characters hold too few tokens,
# as one of blanks, loses any.
MOST_CHARACTERS = 65_536
CHARACTERS_A_POSITION = 64
MOST_IDS = 10**7  # tokenizers fill the gaps between ids; the largest vocabularies have 10^6
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class Tokens:
    """One tokenised caption: its M_j valid tokens and the special tokens."""

    input_ids: list[int]
    valid: list[bool]  # False for [CLS], [SEP] and other special tokens, which stand for no text
    # The index after each token's last character in the caption. There are no starts, as some
    # tokenizers count the blank before a word to its token.
    ends: list[int]
    text: str = ""  # the caption as it was written


@dataclass(frozen=True)
class SpecialTokens:
    """What text encoders need to know of a tokenizer; the defaults are the built-in one's."""

    pad_id: int = 0
    # Whether a text begins with a special token, which can be the class token.
    class_first: bool = True


class CaptionTokenizer:
    """A transformers tokenizer that truncates captions, before and after, and marks valid tokens.

    Attributes:
        vocab_size: all ids are below it.
        positions: the maximum length with special tokens.
        full: whether texts are padded to `positions` and their padding is attended to.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", positions: int, full: bool = False):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Tokenizers of causal models may lack a padding token. The end token replaces it, as the
        # mask marks padding.
        own = open_clip_tokens.own_of(tokenizer)
        pad_id = own.get("pad_id", tokenizer.pad_token_id)
        if pad_id is None:
            pad_id = tokenizer.eos_token_id
        if backend is None or pad_id is None:
            lacks = "token for padding or the end"
            if backend is None:
                lacks = "fast version (tokenizer.json)"
            raise UserError(
                f"data.tokenizer is {tokenizer.name_or_path!r}, which has no {lacks}: choose one "
                "that has"
            )
        self.name = tokenizer.name_or_path
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        if self.vocab_size > MOST_IDS:
            raise UserError(
                f"data.tokenizer is {self.name!r}, whose ids go up to {self.vocab_size - 1:,} for "
                f"{len(tokenizer):,} tokens: choose one that numbers its tokens without gaps"
            )
        # A copy, because transformers changes truncation and padding of its own at every call.
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_padding()
        self.backend.enable_truncation(positions)
        if full and tokenizer.padding_side == "left":
            self.backend.enable_padding(
                direction="left", length=positions, pad_id=pad_id, pad_token=tokenizer.pad_token
            )
        self.positions, self.most_characters = positions, most_characters(positions)
        self.full, self.cleaning = full, open_clip_tokens.Cleaning.of(own)
        self.pad_id: int = pad_id
        self.unknown_id = tokenizer.unk_token_id
        # "[SEP]" written out in a caption becomes the special token but is not in the special
        # tokens mask.
        self.special_ids = {
            self.pad_id,
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        } - {None}

    @property
    def special(self) -> SpecialTokens:
        """The special tokens in this tokenizer's captions."""
        valid = self("a").valid
        return SpecialTokens(self.pad_id, class_first=bool(valid) and not valid[0])

    def __call__(self, text: str) -> Tokens:
        encoding, places = self._encoded(text)
        tokens = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        valid = [not added and token not in self.special_ids for token, added in tokens]
        ends = [end for _, end in encoding.offsets]
        if places is not None:
            ends = [places[end] for end in ends]
        return Tokens(encoding.ids, valid, ends, text)

    def _encoded(self, text: str) -> tuple[Encoding, list[int] | None]:
        """The tokens, and, of a text that is cleaned first, what `Cleaning.places` returns."""
        whole, places = text[: self.most_characters], None
        if self.cleaning is not None:
            cleaned = self.cleaning(whole)
            whole, places = cleaned, self.cleaning.places(whole, cleaned)
        try:
            return self.backend.encode(whole), places
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"  # of Rust, which is no `Exception`
            if not panic and not isinstance(error, Exception):
                raise
            raise UserError(
                f"data.tokenizer is {self.name!r}, which cannot split {shown(text)} "
                f"({one_line(error)}): choose another one"
            ) from None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The range of characters of each position: the first, and the one after the last."""
        out = []
        encoding, places = self._encoded(text)
        for start, end in encoding.offsets:
            if places is not None:
                start, end = places[start], places[end]
            piece = text[start:end]  # some tokenizers count the blank before a word to its token
            out.append((start + len(piece) - len(piece.lstrip()), end))
        return out

    def mostly_unknown(self, text: str) -> bool:
        """Whether more than half of the caption's valid tokens are the unknown token."""
        tokens = self(text)
        valid = list(compress(tokens.input_ids, tokens.valid))
        return 2 * valid.count(self.unknown_id) > len(valid)

    def truncates(self, text: str) -> bool:
        """Whether a text has more tokens than `positions`."""
        return len(text) > self.most_characters or bool(self._encoded(text)[0].overflowing)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)


def most_characters(positions: int) -> int:
    """The number of characters of a text that are tokenised, if `positions` (M) tokens are kept."""
    return max(MOST_CHARACTERS, CHARACTERS_A_POSITION * positions)


def tell_cut(texts: list[str], positions: int) -> str | None:
    """A line about the texts of more than `most_characters`; None if there is none."""
    most = most_characters(positions)
    lengths = [len(text) for text in texts if len(text) > most]
    if not lengths:
        return None
    longer = f"{len(lengths)} of {len(texts)} texts have up to {max(lengths):,} characters"
    return f"{longer}: only the first {most:,} are read"


def tokenizer_of(config: DataConfig, name: str | None = None) -> CaptionTokenizer:
    """Load the tokenizer of a configuration; `name`: another one. Errors: `load_tokenizer`."""
    full = config.padding == "full"
    return load_tokenizer(name or config.tokenizer, config.context_length, full)


def load_tokenizer(name: str, positions: int, full: bool = False) -> CaptionTokenizer:
    """Load the tokenizer that `DataConfig.tokenizer` names; results are at most `positions` long.

    "demo" is MiniLM's (fetched), "builtin" is `builtin_tokenizer`; any other name is a transformers
    name or local path.

    Raises:
        UserError: the tokenizer cannot be loaded, is not fast, or can neither pad nor end a text.
    """
    tokenizer = pretrained_tokenizer(name)
    try:
        return CaptionTokenizer(tokenizer, positions, full)
    except UserError:
        raise
    except Exception as error:  # damaged files can hold anything
        raise UserError(
            f"data.tokenizer is {name!r}, which cannot be used ({reason(error)}): choose another"
        ) from None


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer of that name (see `load_tokenizer`). Raises `UserError`."""
    # Captions are short and tokenised one at a time. Threads would not help, and would warn or hang
    # after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if name == "builtin":
        return builtin_tokenizer()
    if open_clip_tokens.is_own(name):
        return _of_open_clip(name)
    from transformers import AutoTokenizer

    path = assets.minilm() if name == "demo" else Path(name).expanduser()
    local = path.exists()
    check_regular(f"data.tokenizer is {name!r}", path)
    try:
        with loading(hub=not local):
            tokenizer = AutoTokenizer.from_pretrained(
                str(path) if local else name, local_files_only=local, trust_remote_code=False
            )
        siglip = sentencepiece_tokens.is_siglip(tokenizer)
        return sentencepiece_tokens.converted(tokenizer) if siglip else tokenizer
    except UserError:
        raise
    except Exception as error:  # the hub's client, transformers and tokenizers raise their own
        raise UserError(
            f"data.tokenizer is {name!r}, which cannot be loaded ({reason(error)}): "
            "give 'demo', 'builtin', a transformers name or a local folder"
        ) from None


def _of_open_clip(name: str) -> "PreTrainedTokenizerBase":
    try:
        return open_clip_tokens.load(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.tokenizer is {name!r}, which open_clip cannot load ({reason(error)})"
        ) from None


def builtin_tokenizer() -> "PreTrainedTokenizerFast":
    """A lower-case WordPiece tokenizer of transformers that needs no download.

    Its vocabulary holds the special tokens, every printable ASCII character alone and as a ##
    continuation, and the words of the demo pictures' names (`words.txt`). Other ASCII words are
    split into characters; other words are [UNK].
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = WORDS.read_text(encoding="utf-8").split()
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters)]
    pieces += [word for word in words if word not in characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="builtin", **named)
