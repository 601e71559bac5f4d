"""The exported model, which `AutoModel` loads: features, scores and matches of a trained student.

Shapes: I images, J texts, N image patches, M text positions, H hidden size, D embedding dimension,
S image side.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ds_cmli.cmli.loss import MAX_SCALE, Temperature, l2_normalize
from ds_cmli.cmli.op import upcast
from ds_cmli.cmli.reference import cmli_scores_reference, pair_loss_reference
from ds_cmli.config.registry import LOSSES
from ds_cmli.data.tokens import CaptionTokenizer, SpecialTokens
from ds_cmli.export.configuration import CMLIConfig
from ds_cmli.export.processing import CMLIProcessor
from ds_cmli.losses.pairs import MAX_SIGMOID_SCALE
from ds_cmli.models.student import Student
from ds_cmli.scores import Match, both_ways, match

SCORES_AT_ONCE = 2**26  # the number of patch-token similarities in memory at a time


class Loaded(Student):
    """A student whose weights are loaded later, so its encoders are not tried out."""

    def try_out(self, *_: object) -> None:
        pass


class PairLoss(nn.Module):
    """A loss over pairs with its learned temperature and, for a sigmoid loss, its bias, in fp32.

    In 16 bits a temperature would be rounded by up to 2%, and the kinds of scores weigh otherwise.
    """

    def __init__(self, name: str):
        super().__init__()
        entry = LOSSES[name]
        self.name, self.scores, self.kind = name, entry.scores, entry.kind
        cosines = entry.kind == "sigmoid" and entry.scores == "global"
        self.max_scale = MAX_SIGMOID_SCALE if cosines else MAX_SCALE
        bias = 0.0 if entry.kind == "sigmoid" else None
        self.temperature = Temperature(1.0, bias, self.max_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PairLoss":
        """Follow `to`, `half` and the like, but change only the device."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, i2t: Tensor, t2i: Tensor) -> Tensor:
        """Scores [B, B] each, in which row b and column b are a pair -> the loss as in training."""
        if not self.kind:
            raise ValueError(f"return_loss: the loss {self.name!r} is not part of an export")
        return pair_loss_reference(i2t, t2i, self.temperature())


def _both(features: BaseModelOutputWithPooling) -> tuple[Tensor, Tensor]:
    """The class tokens and the patches or tokens, which this model's outputs always have."""
    assert features.pooler_output is not None and features.last_hidden_state is not None
    return features.pooler_output, features.last_hidden_state


@dataclass
class CMLIOutput(ModelOutput):
    loss: Tensor | None = None  # the weighted sum of the run's losses over pairs
    # The "combined" scores, the sum of the trained ones, each times 1/temperature. Not each other's
    # transpose, as they are in CLIP: CMLI from the image's side is not CMLI from the text's.
    # fp32 [I, J], from s_i2t: a row ranks the texts for an image.
    logits_per_image: Tensor | None = None
    # fp32 [J, I], from s_t2i: a row ranks the images for a text.
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None  # [I, H], unit length
    text_embeds: Tensor | None = None  # [J, H], unit length
    patch_embeds: Tensor | None = None  # [I, N, D], unit length
    token_embeds: Tensor | None = None  # [J, M, D], unit length
    # bool [J, M], True for tokens of the text, False for special tokens and padding.
    token_mask: Tensor | None = None


class CMLIModel(PreTrainedModel):
    config_class = CMLIConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["losses"]  # noqa: RUF012

    def __init__(self, config: CMLIConfig):
        super().__init__(config)
        # transformers builds models on meta, where backbones cannot compute their constants.
        with torch.device("cpu"):
            self.student = build_student(config)
            pair_losses = {name: PairLoss(name) for name, _ in config.losses}
            self.losses = nn.ModuleDict(pair_losses)
        saved = self.state_dict().keys()
        self.constants = {name: x for name, x in self.named_buffers() if name not in saved}
        self.eval()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, with the buffers that the file lacks, whose values transformers loses."""
        out = super().from_pretrained(*args, **kwargs)
        model = out[0] if isinstance(out, tuple) else out
        for name, value in model.constants.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, key, value.to(getattr(module, key).device))
        return out

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing, because all weights come from the file."""

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode images, uint8 [I, 3, S, S].

        Returns:
            `pooler_output` [I, H], the class tokens for global scores, and `last_hidden_state`
            [I, N, D], the patches for CMLI. Neither is normalised.
        """
        cls, patches = self.student.encode_image(pixel_values)  # [I, H], [I, N, H]
        return BaseModelOutputWithPooling(self.student.projection(patches), cls)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Encode texts, int64 [J, M], and bool [J, M] (True: attend; None: to all but padding).

        Returns:
            `pooler_output` [J, H] and `last_hidden_state` [J, M, D], which includes special tokens
            and padding (see `token_mask`). Neither is normalised.
        """
        cls, tokens = self.student.encode_text(input_ids, self.attended(input_ids, attention_mask))
        return BaseModelOutputWithPooling(self.student.projection(tokens), cls)

    def attended(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None:
            return attention_mask.bool()
        if self.config.settings["data"].get("padding") == "full":
            return torch.ones_like(input_ids, dtype=torch.bool)
        padding = input_ids == self.config.pad_id
        if self.config.pad_ends_texts:
            padding = padding & (padding.cumsum(1) > 1)  # the first is the text's own end
        return ~padding

    def token_mask(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """bool [J, M], True for tokens of the text, False for special tokens and padding."""
        special = torch.tensor(self.config.special_ids, device=input_ids.device)
        return self.attended(input_ids, attention_mask) & ~torch.isin(input_ids, special)

    def cmli_scores(
        self, patches: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[I, N, D], [J, M, D], bool [J, M] -> s_i2t and s_t2i, fp32 [I, J] each.

        s_i2t is the mean over patches of the similarity to the best token, s_t2i the mean over
        tokens of the similarity to the best patch: FILIP (arXiv 2111.07783), equations 4 and 5. The
        features are those of `get_image_features` and `get_text_features`, normalised or not.
        """
        patches, tokens = l2_normalize(patches), l2_normalize(tokens)
        step = max(1, SCORES_AT_ONCE // max(1, len(tokens) * patches.shape[1] * tokens.shape[1]))
        parts = [cmli_scores_reference(part, tokens, token_mask) for part in patches.split(step)]
        i2t, t2i = zip(*parts, strict=True)
        return torch.cat(i2t), torch.cat(t2i)

    def scales(self) -> dict[str, Tensor]:
        """1/temperature, one element, of each kind of scores that was trained, such as "global".

        Several losses over the same scores: the first one's temperature, as in evaluation.
        """
        out: dict[str, Tensor] = {}
        for loss in self.losses.values():
            assert isinstance(loss, PairLoss)
            out.setdefault(loss.scores, loss.temperature()[:1])
        return out

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool | None = None,
    ) -> CMLIOutput | tuple[Tensor, ...]:
        """Score all images against all texts, each direction by its own score, see `CMLIOutput`.

        For `return_loss`, image b and text b are a pair and all others are negatives of each other,
        compared by all patches and tokens.
        """
        image_cls, patches = _both(self.get_image_features(pixel_values))
        text_cls, tokens = _both(self.get_text_features(input_ids, attention_mask))
        image_cls, text_cls = l2_normalize(image_cls), l2_normalize(text_cls)
        mask = self.token_mask(input_ids, attention_mask)
        cosines = upcast(image_cls) @ upcast(text_cls).t()  # [I, J]
        scores = both_ways(cosines, self.cmli_scores(patches, tokens, mask), self.scales())
        loss = None
        if return_loss:
            if len(image_cls) != len(text_cls):
                raise ValueError(
                    f"return_loss needs pairs: {len(image_cls)} images, {len(text_cls)} texts are "
                    "given"
                )
            parts = []
            for name, weight in self.config.losses:
                pair_loss = self.losses[name]
                assert isinstance(pair_loss, PairLoss)
                parts.append(weight * pair_loss(*scores[pair_loss.scores]))
            loss = torch.stack(parts).sum()
        out = CMLIOutput(
            loss=loss,
            logits_per_image=scores["combined"].i2t,
            logits_per_text=scores["combined"].t2i.t(),
            image_embeds=image_cls,
            text_embeds=text_cls,
            patch_embeds=l2_normalize(patches),
            token_embeds=l2_normalize(tokens),
            token_mask=mask,
        )
        return out.to_tuple() if return_dict is False else out

    @torch.no_grad()
    def match(self, image: object, text: str, processor: CMLIProcessor | None = None) -> Match:
        """Match each word of the text with its best patch, and each patch with its best word.

        Args:
            image: as `CMLIProcessor` takes it.
            processor: None for that of the model's folder.
        """
        if processor is None:
            processor = CMLIProcessor.from_pretrained(str(self.name_or_path))
        inputs = processor(images=image, text=text).to(self.device)
        of_image = self.get_image_features(inputs["pixel_values"])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        valid = self.token_mask(ids, mask)[0]
        of_text = self.get_text_features(ids, mask)
        words = CaptionTokenizer(processor.tokenizer, processor.context_length)
        spans = list(compress(words.spans(text), valid.tolist()))
        tokens = l2_normalize(_both(of_text)[1][0][valid])  # [M, D]
        patches = l2_normalize(_both(of_image)[1][0])  # [N, D]
        return match(tokens, patches, text, spans, self.student.grid)  # CPU-GPU sync


def build_student(config: CMLIConfig) -> Student:
    """The student with random weights, on the CPU."""
    settings = config.settings
    # transformers has set it to the dtype that the user asked for, and initial weights cannot be
    # computed in 16 bits.
    precision = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # messages of its training
            student = Loaded(
                SimpleNamespace(**settings["student"]),  # type: ignore[arg-type]
                settings["data"]["image_size"],
                config.vocab_size,
                settings["data"]["context_length"],
                pretrained=False,
                special=SpecialTokens(config.pad_id, config.class_first),
            )
    finally:
        torch.set_default_dtype(precision)
    return student.to(precision)
