"""The pairs of sources as map-style data sets. n captions."""

from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.aspect import laid_out
from ds_cmli.data.bad import NO_TOKEN, Bad
from ds_cmli.data.batch import Sample
from ds_cmli.data.captions import drawn, sentences
from ds_cmli.data.numbered import Pictures, describe, of_sources
from ds_cmli.data.sampler import Draw
from ds_cmli.data.sources.base import Source
from ds_cmli.data.tokens import CaptionTokenizer, Tokens
from ds_cmli.data.transforms import Augmentation

MOST_TRIES = 100  # training stops after this many consecutive samples that cannot be used


class TrainPairs(Dataset):
    """A map-style data set of pictures, each with one of its captions and one view.

    A hash chooses them for each turn. A sample whose picture or caption cannot be used is replaced
    by the next usable one of its source, which is always the same; `Sample.bad` records that.

    Raises:
        UserError: `MOST_TRIES` samples in a row cannot be used.
    """

    def __init__(
        self, sources: list[Source], tokenizer: CaptionTokenizer, config: DataConfig, seed: int
    ):
        self.pictures, self.tokenizer, self.seed = Pictures(sources, config), tokenizer, seed
        self.config = config
        self.augmentation = Augmentation(config.augmentation, seed, self.pictures.framing)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int | Draw) -> Sample:
        index, turn = Draw.of(at)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = self.pictures.at(index)
        source, first = self.pictures.sources[number], index - place
        first_bad: Bad | None = None
        tries = min(MOST_TRIES, len(source))
        for step in range(tries):
            sample = self._pair(first + (place + step) % len(source), turn)
            if sample.bad is None:
                return replace(sample, index=index, bad=first_bad)
            first_bad = first_bad or sample.bad
        assert first_bad is not None
        raise UserError(
            f"{tries} samples in a row of {source.where} cannot be used, from {first_bad[0]} "
            f"({first_bad[1]}) on: mend or remove them"
        )

    def _pair(self, index: int, turn: int) -> Sample:
        captions, reason = [""], None
        try:
            captions = self.texts(index)
        except Exception as error:  # any error is reported in `Sample.bad`
            reason = describe(error)
        text = self.tokenizer(captions[drawn(len(captions), self.seed, turn, index)])
        if reason is None and not any(text.valid):
            reason = NO_TOKEN
        image = self.pictures.black()
        if reason is None:
            with self.augmentation.seeded(turn, index):
                image, reason = self.pictures.image(index, self.augmentation.view)
                image, _ = self.augmentation.pixels(image)
        return _sample(self.pictures, index, image, text, reason)

    def texts(self, index: int) -> list[str]:
        """The captions of a picture, or their sentences. Raises as `Source.captions`."""
        captions = self.pictures.captions(index)
        return sentences(captions) if self.config.split_sentences else captions


class EvalPairs(Dataset):
    """A map-style data set of all n captions of all pictures, as `evaluate.held_out` takes it.

    Attributes:
        bad: pictures and captions that were left out at load.
    """

    def __init__(self, sources: list[Source], tokenizer: CaptionTokenizer, config: DataConfig):
        self.pictures, self.tokenizer = Pictures(sources, config), tokenizer
        self.size = config.image_size
        self.bad = of_sources(sources)
        self.rows: list[tuple[int, int]] = []  # (picture, which of its captions)
        for picture in range(len(self.pictures)):
            try:
                count = len(self.pictures.captions(picture))
            except Exception as error:
                self.bad.append((self.pictures.name(picture), describe(error)))
                continue
            self.rows += [(picture, caption) for caption in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.pair(row)

    def name(self, row: int) -> str:
        return self.pictures.name(self.rows[row][0])

    def image_id(self, row: int) -> int:
        return self.pictures.image_id(self.rows[row][0])

    def pair(self, row: int, picture: bool = True) -> Sample:
        """The sample, even if it cannot be used: then `bad` says why.

        A picture that cannot be read is black. Without `picture` it is not read and black.
        """
        index, caption = self.rows[row]
        tokens = self.tokenizer(self.pictures.captions(index)[caption])
        image, reason = self.pictures.image(index) if picture else (self.pictures.black(), None)
        if not any(tokens.valid):
            reason = reason or NO_TOKEN
        return replace(_sample(self.pictures, index, image, tokens, reason), index=row)


def _sample(
    pictures: Pictures, index: int, image: Tensor, tokens: Tokens, reason: str | None
) -> Sample:
    """The sample of a picture and a caption, `reason` says why it cannot be used."""
    bad = None if reason is None else (pictures.name(index), reason)
    image, grid = laid_out(image, pictures.config.aspect_patch, pictures.config.image_size)
    return Sample(image, tokens, index, pictures.image_id(index), bad=bad, grid=grid)
