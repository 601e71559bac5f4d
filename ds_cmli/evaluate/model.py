"""The model that is evaluated: a run, or what training may start from.

Shapes: r pictures, t captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.pair_scores import BothWays
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config, load_config
from ds_cmli.config.sources import Source, to_evaluate
from ds_cmli.data.aspect import laid_out
from ds_cmli.data.loaders import batches
from ds_cmli.data.numbered import black, describe
from ds_cmli.data.pictures import decode, most_bytes, opened, prepare, read_file
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.data.transforms import Box, Framing
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Images, Texts, embed_images, embed_listed
from ds_cmli.evaluate.held_out import NumberedView, Picture, collate_pictures
from ds_cmli.evaluate.retrieval import pair_scores
from ds_cmli.losses.scoring import Scoring

if TYPE_CHECKING:
    from ds_cmli.data.load import EvalData
    from ds_cmli.losses.objective import Objective


def load_objective(
    config: Config, folder: Path, ema: bool, data: "EvalData", device: torch.device
) -> "Objective":
    """Load the trained student with the temperatures of its scores, or with `ema` its average.

    No teacher is built, because evaluation does not need it. Raises `UserError`.
    """
    from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS, load_student

    objective = load_student(folder, config, data, AVERAGE if ema else WEIGHTS)
    config.loss = objective.config
    return objective.to(device)


def source_objective(config: Config, data: "EvalData", device: torch.device) -> "Objective":
    """Build the model of `student.source`, with its weights. Raises `UserError`."""
    from ds_cmli.engine import build_models

    objective, _ = build_models(config, data.vocab_size, special=data.special)
    return objective.to(device)


class PictureFile(NamedTuple):
    """A picture, or a part of one."""

    file: Path
    box: Box | None = None  # left, top, right, bottom in pixels; None: all of it


@dataclass(frozen=True)
class EvaluatedModel(Scoring):
    """A model in one process, which embeds lists of pictures and of texts."""

    name: str
    config: Config
    objective: "Objective"
    tokenizer: CaptionTokenizer
    how: EmbedSettings

    @classmethod
    def load(cls, name: str, batch_size: int, workers: int, ema: bool = False) -> "EvaluatedModel":
        """Load a run's student, or the model that `student.source` would take. Collective.

        Raises:
            UserError: there is none, or `ema` is given for a model that is no run.
        """
        from ds_cmli.data.load import EvalData

        source = Source(name)
        device = distributed.init()  # collective
        if distributed.world_size() > 1:
            raise UserError("--suite runs in one process: start it without torchrun")
        if source.has_own_data:
            config = load_config(source.path / "config.json", "MODEL")
            data = EvalData(tokenizer=tokenizer_of(config.data))
            objective = load_objective(config, source.path, ema, data, device)
        else:
            if ema:
                raise UserError(f"{name!r} is no run, which has averages: leave out --ema")
            config = to_evaluate(source)
            data = EvalData(tokenizer=tokenizer_of(config.data))
            objective = source_objective(config, data, device)
        how = EmbedSettings(batch_size, device, workers)
        return cls(name, config, objective.eval(), data.tokenizer, how)

    def read(self, picture: PictureFile) -> Picture:
        """A picture as the model is shown it, or a black one that says why it cannot be read."""
        data = self.config.data
        framing = Framing.of(data)
        try:
            content = read_file(picture.file, "", most_bytes(data.max_pixels), True)
            if picture.box is None:
                image = decode(content, framing, data.max_pixels)
            else:
                with opened(content, data.max_pixels) as whole:
                    image = prepare(whole.crop(picture.box), framing)
            image, grid = laid_out(image, data.aspect_patch, data.image_size)
            return Picture(image, 0, grid=grid)
        except Exception as error:  # decoders raise nearly any exception for damaged files
            return Picture(black(data.image_size), 0, bad=(str(picture.file), describe(error)))

    def scores(
        self, images: Images, of_images: Tensor, texts: Texts, of_texts: Tensor
    ) -> dict[str, BothWays]:
        """Each kind of scores of some rows of images, int64 [I], with some of texts, int64 [J].

        fp32 [I, J] each, on the CPU. CPU-GPU sync.
        """
        captions, device = texts.block(of_texts), self.how.device
        return pair_scores(images, of_images, captions, self.scales, device)

    @torch.no_grad()
    def images(self, pictures: Sequence[PictureFile]) -> Images:
        """Embed pictures, in their order. Raises `UserError` for one that cannot be read."""

        def picture(number: int) -> Picture:
            return replace(self.read(pictures[number]), number=number)

        shown = NumberedView(picture, range(len(pictures)))
        loader = batches(shown, self.how.batch_size, self.how.workers, collate_pictures)
        images = embed_images(self.objective.student, loader, self.how)
        for name, reason in images.broken.values():
            raise UserError(f"the picture {name} cannot be read ({reason}): fetch it again")
        return images

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Texts:
        """Embed texts, in their order. Raises `UserError` for one without a token."""
        numbers, student = range(len(texts)), self.objective.student
        embedded, empty = embed_listed(student, self.tokenizer, texts, numbers, self.how)
        if empty:
            raise UserError(f"the caption {texts[empty[0]]!r} has no token: repair its list")
        return embedded
