"""Tokenising captions: loading a tokenizer, and which tokens are valid and where they end."""

import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ds_cmli.common.errors import UserError, blame
from ds_cmli.common.pretrained import loading
from ds_cmli.config.open_clip import DEFAULT_TOKENIZER, LOCAL, NAMED, is_marked
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import assets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = Path(__file__).with_name("words.txt")
MOST_CHARACTERS = 65_536  # of a text that are tokenised: 5 MB would take 10 s
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
    """A transformers tokenizer that truncates captions and marks valid tokens.

    Attributes:
        vocab_size: all ids are below it.
        positions: the maximum length with special tokens.
        full: whether texts are padded to `positions` and their padding is attended to.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", positions: int, full: bool = False):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # open_clip pads with a token of the vocabulary, which is not special in a text.
        pad_id = tokenizer.init_kwargs.get("pad_id", tokenizer.pad_token_id)
        # Tokenizers of causal models may lack a padding token. The end token replaces it, as the
        # mask marks padding.
        if pad_id is None:
            pad_id = tokenizer.eos_token_id
        self.name = tokenizer.name_or_path
        if backend is None or pad_id is None:
            lacks = "a fast version (tokenizer.json)"
            if backend is not None:
                lacks = "a token for padding or the end"
            raise UserError(f"data.tokenizer is {self.name!r}, which lacks {lacks}: choose another")
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        # A copy, because transformers changes truncation and padding of its own at every call.
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_padding()
        self.backend.enable_truncation(positions)
        if full and tokenizer.padding_side == "left":
            self.backend.enable_padding(
                direction="left", length=positions, pad_id=pad_id, pad_token=tokenizer.pad_token
            )
        self.positions, self.full, self.pad_id = positions, full, int(pad_id)
        # "[SEP]" written out in a caption becomes the special token but is not in the special
        # tokens mask.
        names = ("pad", "cls", "sep", "bos", "eos")
        named = {getattr(tokenizer, f"{name}_token_id") for name in names} - {None}
        self.special_ids = {self.pad_id, *named}

    @property
    def special(self) -> SpecialTokens:
        """The special tokens in this tokenizer's captions."""
        valid = self("a").valid
        return SpecialTokens(self.pad_id, class_first=bool(valid) and not valid[0])

    def __call__(self, text: str) -> Tokens:
        encoding = self._encoded(text)
        tokens = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        valid = [not added and token not in self.special_ids for token, added in tokens]
        return Tokens(encoding.ids, valid, [end for _, end in encoding.offsets], text)

    def _encoded(self, text: str) -> Encoding:
        with blame(f"data.tokenizer is {self.name!r}, which cannot split {text[:60]!r}"):
            return self.backend.encode(text[:MOST_CHARACTERS])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The range of characters of each position: the first, and the one after the last."""
        out = []
        for start, end in self._encoded(text).offsets:
            piece = text[start:end]  # some tokenizers count the blank before a word to its token
            out.append((start + len(piece) - len(piece.lstrip()), end))
        return out

    def truncates(self, text: str) -> bool:
        """Whether a text has more tokens than `positions`."""
        return len(text) > MOST_CHARACTERS or bool(self._encoded(text).overflowing)


def tokenizer_of(config: DataConfig, name: str | None = None) -> CaptionTokenizer:
    """Load the tokenizer of a configuration; `name`: another one. Errors: `load_tokenizer`."""
    full = config.padding == "full"
    return load_tokenizer(name or config.tokenizer, config.context_length, full)


def load_tokenizer(name: str, positions: int, full: bool = False) -> CaptionTokenizer:
    """Load the tokenizer that `DataConfig.tokenizer` names; results are at most `positions` long.

    "demo" is MiniLM's (fetched), "builtin" is `builtin_tokenizer`; any other name is a transformers
    name or local path, or marked as open_clip's.

    Raises:
        UserError: the tokenizer cannot be loaded, is not fast, can neither pad nor end a text, has
            ids beyond its vocabulary, or more special tokens than positions.
    """
    tokenizer = pretrained_tokenizer(name)
    with blame(f"data.tokenizer is {name!r}, which cannot be used"):
        ours = CaptionTokenizer(tokenizer, positions, full)
        tokens = ours("a")
        if max(tokens.input_ids, default=0) >= ours.vocab_size or len(tokens.valid) > positions:
            raise ValueError(f"its tokens of 'a' are {tokens.input_ids}, of {ours.vocab_size:,}")
    return ours


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer of that name (see `load_tokenizer`). Raises `UserError`."""
    # Captions are short and tokenised one at a time. Threads would not help, and would warn or hang
    # after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if name == "builtin":
        return builtin_tokenizer()
    with blame(f"data.tokenizer is {name!r}, which cannot be loaded"):
        if name == DEFAULT_TOKENIZER or is_marked(name):
            return open_clip_tokenizer(name)
        from transformers import AutoTokenizer

        path = assets.minilm() if name == "demo" else Path(os.path.expanduser(name))
        local = path.exists()
        with loading(hub=not local):
            return AutoTokenizer.from_pretrained(
                str(path) if local else name, local_files_only=local, trust_remote_code=False
            )


def open_clip_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of an open_clip model as a fast one, with the same ids and with offsets.

    open_clip cleans a text before it splits it. Case, blanks and punctuation become normalizers
    here; mojibake and HTML's entities stay as they are.
    """
    import open_clip
    from open_clip.tokenizer import get_clean_fn
    from transformers import PreTrainedTokenizerFast

    model = "" if name == DEFAULT_TOKENIZER else name.removeprefix(NAMED)
    with loading(hub=not name.startswith(LOCAL)):
        given: Any = open_clip.get_tokenizer(model)
    blanks = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    lower = [*blanks, normalizers.Lowercase()]
    # Underscores are blanks in open_clip's `canonicalize_text`, and all punctuation goes.
    signs = Regex("[" + "".join("\\" + sign for sign in string.punctuation) + "]")
    canonical = [normalizers.Replace("_", " "), normalizers.Replace(signs, ""), *lower[::-1]]
    cleaning = {"lower": lower, "whitespace": blanks, "canonicalize": canonical}
    ways = [way for way in cleaning if get_clean_fn(way) == given.clean_fn]
    if getattr(given, "reduction_fn", None) or getattr(given, "tokenizer_mode", None) or not ways:
        raise UserError(f"data.tokenizer is {name!r}, which shortens or marks texts in its own way")
    if isinstance(given, open_clip.SimpleTokenizer):
        backend, special = _byte_pairs(given)
    else:
        whole = given.tokenizer
        backend = Tokenizer.from_str(whole.backend_tokenizer.to_str())
        special = dict(whole.special_tokens_map)
        if given.strip_sep_token:  # its place is filled with padding, of the id 0
            first, pad = whole.cls_token, whole.convert_ids_to_tokens(0)
            backend.post_processor = processors.TemplateProcessing(
                f"{first} $A {pad}", special_tokens=[(first, whole.cls_token_id), (pad, 0)]
            )
    own = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([*cleaning[ways[0]], *own])
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=name, **special)


def _byte_pairs(given: Any) -> tuple[Tokenizer, dict[str, str | int]]:
    """CLIP's byte pairs from open_clip's tables."""
    start, end = given.decoder[given.sot_token_id], given.decoder[given.eot_token_id]
    merges = [
        merge for merge in sorted(given.bpe_ranks, key=given.bpe_ranks.get) if len(merge) == 2
    ]
    backend = Tokenizer(models.BPE(given.encoder, merges, end_of_word_suffix="</w>"))
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ends = [(start, given.sot_token_id), (end, given.eot_token_id)]
    backend.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=ends)
    return backend, {"bos_token": start, "eos_token": end, "pad_id": 0}


def builtin_tokenizer() -> "PreTrainedTokenizerFast":
    """A lower-case WordPiece tokenizer of transformers that needs no download.

    Its vocabulary holds the special tokens, every printable ASCII character alone and as a ##
    continuation, and the words of the demo pictures' names (`words.txt`). Other ASCII words are
    split into characters; other words are [UNK].
    """
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
