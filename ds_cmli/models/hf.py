"""The student as a model of transformers: a run's folder is one, and all that is trained loads so:

    import ds_cmli.models.hf  # registers the classes
    model, processor = AutoModel.from_pretrained(RUN), AutoProcessor.from_pretrained(RUN)

With `variant="ema"` it is the average of the weights, with `variant="best"` the best evaluation's.

Shapes: I images, J texts, N image patches, M text positions, H hidden size, D embedding dimension,
S image side.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import ModelOutput

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.loss import MAX_SCALE, MAX_SIGMOID_SCALE, Temperature
from ds_cmli.config.registry import LOSSES, over_pairs, score_scales
from ds_cmli.config.schema import Config, DataConfig, Interpolation, Resize, StudentConfig
from ds_cmli.config.source import MODEL_CONFIG, NO_TRAINING
from ds_cmli.data.images import View, black
from ds_cmli.data.pairs import Collate, Sample
from ds_cmli.data.tokens import CaptionTokenizer, pretrained_tokenizer
from ds_cmli.errors import UserError, blame
from ds_cmli.models.encoders import changed_fields
from ds_cmli.models.student import Student
from ds_cmli.pretrained import loading
from ds_cmli.scores import all_kinds

WEIGHTS = "model.safetensors"
AVERAGE = "model.ema.safetensors"  # this one and the next are variants, as transformers names them
BEST = "model.best.safetensors"
# The settings of `data` that say how pictures and texts are prepared.
PREPARATION = ("image_size", "resize", "interpolation", "context_length", "padding")


class CMLIConfig(transformers.PreTrainedConfig):
    """All that decides a tensor's shape or a score's value."""

    model_type = "ds_cmli"

    # The run's section `student`, with all sizes and without paths, and those settings of `data`
    # that say how pictures and texts are prepared.
    settings: dict[str, Any] | None = None
    losses: list[Any] | tuple[Any, ...] = ()  # over pairs, [name, weight], in the run's order
    vocab_size: int = 0  # of the text encoder's table
    pad_id: int = 0
    special_ids: list[int] | tuple[int, ...] = ()  # tokens that do not belong to a text itself


@dataclass
class CMLIOutput(ModelOutput):
    # The "combined" scores, the sum of the trained ones, each times 1/temperature. Not each other's
    # transpose, as they are in CLIP: CMLI from the image's side is not CMLI from the text's.
    logits_per_image: Tensor | None = None  # fp32 [I, J]: a row ranks the texts for an image
    logits_per_text: Tensor | None = None  # fp32 [J, I]: a row ranks the images for a text
    image_embeds: Tensor | None = None  # [I, H], these four of unit length
    text_embeds: Tensor | None = None  # [J, H]
    patch_embeds: Tensor | None = None  # [I, N, D]
    token_embeds: Tensor | None = None  # [J, M, D]
    token_mask: Tensor | None = None  # bool [J, M], False for special tokens and padding


class CMLIModel(transformers.PreTrainedModel):
    config_class = CMLIConfig
    config: CMLIConfig
    main_input_name = "pixel_values"
    # In 16 bits a temperature would be rounded by up to 2%.
    _keep_in_fp32_modules_strict = ["losses"]  # noqa: RUF012 (mypy: no ClassVar)

    def __init__(self, config: CMLIConfig):
        super().__init__(config)
        settings: Any = config.settings
        # transformers builds on meta and in the user's precision. Encoders need the CPU and fp32 to
        # compute their constants and random weights.
        precision = torch.get_default_dtype()
        with torch.device("cpu"), local_torch_dtype(torch.float32):
            student = Student(
                StudentConfig(**settings["student"]),
                settings["data"]["image_size"],
                config.vocab_size,
                settings["data"]["context_length"],
                pretrained=False,
                pad_id=config.pad_id,
            )
            losses = {name: loss_temperature(name) for name, _ in config.losses}
        self.losses = nn.ModuleDict(losses)
        self.student = student.to(precision)
        self._constants = dict(self.named_non_persistent_buffers())
        self.post_init()
        # transformers looks for tied tables one module deep; T5's is three.
        for name, module in self.named_modules():
            if isinstance(module, transformers.PreTrainedModel) and module is not self:
                for copy, table in module.all_tied_weights_keys.items():
                    self.all_tied_weights_keys[f"{name}.{copy}"] = f"{name}.{table}"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, with the buffers that no file has, whose values transformers loses."""
        out = super().from_pretrained(*args, **kwargs)
        model, *_ = out if isinstance(out, tuple) else (out,)
        for name, value in model._constants.items():
            model.get_buffer(name).copy_(value)
        return out

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: all weights come from the file."""

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """uint8 [I, 3, S, S] -> `pooler_output` [I, H] for global scores and `last_hidden_state`
        [I, N, D] for CMLI, not normalised."""
        cls, patches = self.student.encode_image(pixel_values)
        return BaseModelOutputWithPooling(self.student.projection(patches), cls)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> BaseModelOutputWithPooling:
        """int64 [J, M], bool [J, M] (True: attend) -> as images', [J, H] and [J, M, D], with
        special tokens and padding (see `token_mask`)."""
        cls, tokens = self.student.encode_text(input_ids, attention_mask.bool())
        return BaseModelOutputWithPooling(self.student.projection(tokens), cls)

    def token_mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return bool [J, M], True for the tokens of a text itself."""
        special = torch.tensor(self.config.special_ids, device=input_ids.device)
        return attention_mask.bool() & ~torch.isin(input_ids, special)

    def scales(self) -> dict[str, float]:
        """Return 1/temperature of each loss over pairs, by name. CPU-GPU sync."""
        scales = {}
        for name, _ in self.config.losses:
            scale, *_ = self.get_submodule(f"losses.{name}.temperature")()
            scales[name] = scale.item()
        return scales

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor
    ) -> CMLIOutput:
        """Score all images against all texts. CPU-GPU sync."""
        image_cls, patches = self.student.image_embeddings(pixel_values)
        text_cls, tokens = self.student.text_embeddings(input_ids, attention_mask.bool())
        mask = self.token_mask(input_ids, attention_mask)
        cosines = image_cls @ text_cls.t()
        cmli = cmli_scores(patches, tokens, mask)  # s_i2t and s_t2i
        combined = all_kinds(cosines, cmli, score_scales(self.scales()))["combined"]
        features = (image_cls, text_cls, patches, tokens, mask)
        return CMLIOutput(combined.i2t, combined.t2i.t(), *features)


def loss_temperature(name: str) -> nn.ModuleDict:
    loss = LOSSES[name]
    max_scale = MAX_SIGMOID_SCALE if loss.sigmoid and loss.scores == "global" else MAX_SCALE
    temperature = Temperature(1.0, 0.0 if loss.sigmoid else None, max_scale)
    return nn.ModuleDict({"temperature": temperature})


class CMLIProcessor(transformers.ProcessorMixin):
    """Prepares pictures and texts as training does, to the bit, by those settings of `data`."""

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
        image_size: int = DataConfig.image_size,
        resize: Resize = "crop",
        interpolation: Interpolation = "bicubic",
        context_length: int = DataConfig.context_length,
        padding: str = "longest",
    ):
        self.image_size = image_size
        self.resize = resize
        self.interpolation = interpolation
        self.context_length = context_length
        self.padding = padding
        super().__init__(tokenizer)

    @cached_property
    def caption_tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer(self.tokenizer, self.context_length, self.padding == "full")

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        truncation: bool = True,
        return_tensors: str = "pt",
    ) -> transformers.BatchFeature:
        """Prepare one or several pictures (files, their content, or in memory), texts, or both.

        Returns:
            `pixel_values` uint8 [I, 3, S, S]; `input_ids` int64 and `attention_mask` bool [J, M].
        """
        if padding not in (True, "longest") or not truncation:
            raise ValueError("texts are padded and cut off as in training: leave that out")
        inputs: dict[str, Tensor] = {}
        if images is not None:
            several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
            view = View(self.image_size, self.resize, self.interpolation)
            inputs["pixel_values"] = torch.stack([*map(view, images if several else [images])])
        if text is not None:
            tokens = map(self.caption_tokenizer, [text] if isinstance(text, str) else text)
            batch = Collate(self.caption_tokenizer)([Sample(black(0), x, 0, 0) for x in tokens])
            inputs["input_ids"] = batch.input_ids
            inputs["attention_mask"] = batch.attention_mask
        return transformers.BatchFeature(inputs, tensor_type=return_tensors)


def write_config(folder: Path, config: Config, student: Student, words: CaptionTokenizer) -> None:
    """Write config.json and the processor's files into a run's folder, each whole or not at all."""
    data = {name: getattr(config.data, name) for name in PREPARATION}
    settings = asdict(config.student) | NO_TRAINING | {"source": ""}
    text = getattr(getattr(student.text, "model", None), "config", None)
    if not config.student.source_config:
        settings |= {"image_weights": "random", "text_weights": "random"}
        if text is not None:
            settings |= {"text_model": text.model_type, "text_overrides": changed_fields(text)}
    sample = words("a")
    added = [i for i, valid in zip(sample.input_ids, sample.valid, strict=True) if not valid]
    model_config = CMLIConfig(
        settings={"student": settings, "data": data},
        losses=[*over_pairs(config.loss.weights).items()],
        vocab_size=getattr(student.text, "vocab_size", words.vocab_size),
        pad_id=words.pad_id,
        special_ids=sorted({*words.special_ids, *added}),
        architectures=[CMLIModel.__name__],
        dtype="float32",  # of the file: `save_pretrained` of the module would write the engine's
    )
    unfinished = folder / "model.writing"
    unfinished.mkdir(exist_ok=True)
    model_config.save_pretrained(unfinished)
    CMLIProcessor(pretrained_tokenizer(config.data.tokenizer), **data).save_pretrained(unfinished)
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)
    unfinished.rmdir()


def load_model(folder: Path, file: str = WEIGHTS, setting: str = "--checkpoint") -> CMLIModel:
    """Load the model of a run or of an export, in eval mode; `file`: `WEIGHTS` or a variant.

    Raises `UserError`, which names `setting`, if it is not there, or damaged.
    """
    place = f"{setting} is {str(folder)!r}"
    for name in (MODEL_CONFIG, WEIGHTS, file):
        if not (folder / name).is_file():
            remedy = "give a run's output folder"
            if name == AVERAGE:
                remedy = "leave out --ema: the run was made without optim.ema_decay"
            raise UserError(f"{place}: no {name} there; {remedy}")
    variant = file.removeprefix("model").removesuffix("safetensors").strip(".") or None
    with blame(f"{place}, whose {file} cannot be loaded"), loading(hub=False):
        model, info = CMLIModel.from_pretrained(
            folder, variant=variant, local_files_only=True, output_loading_info=True
        )
    unlike = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if unlike:
        raise UserError(f"{place}: its {file} does not fit: {min(map(str, unlike))!r}")
    return model


transformers.AutoConfig.register(CMLIConfig.model_type, CMLIConfig)
transformers.AutoModel.register(CMLIConfig, CMLIModel)
transformers.AutoProcessor.register(CMLIConfig, CMLIProcessor)
