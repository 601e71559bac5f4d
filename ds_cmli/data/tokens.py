"""Tokenising captions: loading a tokenizer, and which tokens are valid and where they end."""

import string
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, normalizers, processors

from ds_cmli.config.schema import DataConfig
from ds_cmli.config.source import ARCHITECTURE_PREFIX, DEFAULT_TOKENIZER, LOCAL_PREFIX, is_marked
from ds_cmli.data import assets
from ds_cmli.errors import UserError, blame
from ds_cmli.pretrained import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = Path(__file__).with_name("words.txt")
MAX_UNUSED_IDS = 10_000  # beside as many as there are tokens: embeddings that nothing trains
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class Tokens:
    """One tokenised caption: its M_j valid tokens and the special tokens."""

    input_ids: list[int]
    valid: list[bool]  # False for [CLS], [SEP] and other special tokens, which stand for no text
    # The range of characters of each token: the first, and the one after the last.
    offsets: list[tuple[int, int]]
    text: str = ""  # the caption as it was written

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The offsets of the valid tokens, without the blank that some have before a word."""
        offsets = compress(self.offsets, self.valid)
        return [(end - len(self.text[start:end].lstrip()), end) for start, end in offsets]


class CaptionTokenizer:
    """A transformers tokenizer that truncates captions and marks valid tokens.

    Args:
        positions: the maximum length with special tokens.
        full: whether texts are padded to it and their padding is attended to.

    Raises ValueError for a tokenizer that cannot serve.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", positions: int, full: bool = False):
        self.name = tokenizer.name_or_path
        self.positions = positions
        self.full = full
        # A causal model's may lack a padding token: the end token replaces it, as the mask marks
        # padding. open_clip pads with a token of the vocabulary, which is not special in a text.
        ids = [tokenizer.init_kwargs.get("pad_id"), tokenizer.pad_token_id, tokenizer.eos_token_id]
        pad_id = next((number for number in ids if number is not None), None)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or pad_id is None:
            lacks = "fast version (tokenizer.json)" if backend is None else "padding or end token"
            raise ValueError(f"it has no {lacks}: choose another")
        self.pad_id = int(pad_id)
        num_tokens = len(tokenizer)
        largest_id = max(tokenizer.get_vocab().values(), default=0)
        if largest_id > 2 * num_tokens + MAX_UNUSED_IDS:
            raise ValueError(f"the largest of its {num_tokens:,} ids is {largest_id:,}")
        self.vocab_size = max(num_tokens, 1 + largest_id)
        # A copy, because transformers changes truncation and padding of its own at every call.
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        encoding = self.backend.encode("a b", add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        if starts != sorted(starts):
            raise ValueError(f"its tokens of 'a b' are {encoding.ids}: its template repeats a text")
        self.backend.enable_truncation(positions)
        if full and tokenizer.padding_side == "left":
            self.backend.enable_padding(
                direction="left", length=positions, pad_id=pad_id, pad_token=tokenizer.pad_token
            )
        # "[SEP]" written out in a caption becomes the special token but is not in the special
        # tokens mask.
        names = ("pad", "cls", "sep", "bos", "eos")
        named_ids = {getattr(tokenizer, f"{name}_token_id") for name in names}
        self.special_ids = {self.pad_id, *named_ids} - {None}
        ids = self("a").input_ids
        if max(ids, default=0) >= self.vocab_size or len(ids) > positions:
            raise ValueError(f"its tokens of 'a' are {ids}, of {self.vocab_size:,}")

    def __call__(self, text: str) -> Tokens:
        with blame(f"data.tokenizer is {self.name!r}, which cannot split {text[:60]!r}"):
            encoding = self.backend.encode(text)
        tokens = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        valid = [not added and token not in self.special_ids for token, added in tokens]
        return Tokens(encoding.ids, valid, encoding.offsets, text)


def tokenizer_of(config: DataConfig) -> CaptionTokenizer:
    """Load the tokenizer that `config` names. Raises `UserError`."""
    tokenizer = pretrained_tokenizer(config.tokenizer)
    with blame(f"data.tokenizer is {config.tokenizer!r}, which cannot be used"):
        return CaptionTokenizer(tokenizer, config.context_length, config.padding == "full")


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Return the transformers tokenizer of that name. Raises `UserError`.

    "demo" is MiniLM's (fetched), "builtin" is `builtin_tokenizer`; any other name is a transformers
    name or local path, or marked as open_clip's.
    """
    if name == "builtin":
        return builtin_tokenizer()
    with blame(f"data.tokenizer is {name!r}, which cannot be loaded"):
        if name == DEFAULT_TOKENIZER or is_marked(name):
            return open_clip_tokenizer(name)
        from transformers import AutoTokenizer

        path = assets.fetch("minilm") if name == "demo" else Path(name).expanduser()
        local = path.exists()
        with loading(hub=not local, name=f"tokenizer {name}"):
            return AutoTokenizer.from_pretrained(
                str(path) if local else name, local_files_only=local, trust_remote_code=False
            )


def open_clip_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of an open_clip model as a fast one, with the same ids and offsets.

    open_clip cleans a text before it splits it. Case, blanks and punctuation become normalizers
    here; mojibake and HTML's entities stay as they are.
    """
    import open_clip
    from open_clip.tokenizer import get_clean_fn
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    with loading(hub=not name.startswith(LOCAL_PREFIX), name=f"tokenizer {name}"):
        model = "" if name == DEFAULT_TOKENIZER else name.removeprefix(ARCHITECTURE_PREFIX)
        given: Any = open_clip.get_tokenizer(model)
    # The ways in which open_clip cleans texts, by its names for them.
    blanks = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    lower = [*blanks, normalizers.Lowercase()]
    # Underscores are blanks in open_clip's `canonicalize_text`, and all punctuation goes.
    signs = Regex("[" + "".join("\\" + sign for sign in string.punctuation) + "]")
    canonical = [normalizers.Replace("_", " "), normalizers.Replace(signs, ""), *lower[::-1]]
    cleaning = {"lower": lower, "whitespace": blanks, "canonicalize": canonical}
    clean = next((cleaning[way] for way in cleaning if get_clean_fn(way) == given.clean_fn), None)
    if getattr(given, "reduction_fn", None) or getattr(given, "tokenizer_mode", None) or not clean:
        raise UserError(f"data.tokenizer is {name!r}, which shortens or marks texts in its own way")
    if isinstance(given, open_clip.SimpleTokenizer):
        start = given.decoder[given.sot_token_id]
        end = given.decoder[given.eot_token_id]
        merges = [merge for merge in given.bpe_ranks if len(merge) == 2]
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
        fast: Any = CLIPTokenizer(vocab=given.encoder, merges=merges, **special)
        special["pad_id"] = 0
    else:
        fast = given.tokenizer
        special = dict(fast.special_tokens_map)
    backend = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    if getattr(given, "strip_sep_token", False):  # its place is filled with padding, of the id 0
        cls = fast.cls_token
        pad = fast.convert_ids_to_tokens(0)
        backend.post_processor = processors.TemplateProcessing(
            f"{cls} $A {pad}", special_tokens=[(cls, fast.cls_token_id), (pad, 0)]
        )
    backend.normalizer = normalizers.Sequence([*clean, *filter(None, [backend.normalizer])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=name, **special)


def builtin_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a lower-case WordPiece tokenizer of transformers that needs no download.

    Its vocabulary holds the special tokens, every printable ASCII character alone and as a ##
    continuation, and the words of the demo pictures' names (`words.txt`). Other ASCII words are
    split into characters; other words are [UNK].
    """
    from transformers import BertTokenizer

    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = WORDS.read_text(encoding="utf-8").split()
    # Each once, at its first place: some words are characters.
    pieces = dict.fromkeys([*SPECIAL, *characters, *(f"##{c}" for c in characters), *words])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocabulary, name_or_path="builtin")
