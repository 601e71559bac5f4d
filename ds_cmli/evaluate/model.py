"""The model that is evaluated: a run, one of its files of weights, or what training starts from."""

from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import read
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import load_config
from ds_cmli.config.sources import RUN, Source, to_evaluate


class EvaluatedModel:
    def __init__(self, name: str, is_run: bool) -> None:
        """Read its configuration, without torch; raises `UserError`."""
        self.source, self.precision = Source(name), "fp32"
        self.is_run = is_run or self.source.has_own_data
        self.trained = self.is_run or self.source.is_run  # temperatures, of an export too
        if self.is_run:
            self.config = load_config(self.source.path / RUN, "--checkpoint")
            written = read(self.source.path / RUN, dict).get("deepspeed", {})
            self.precision = DeepSpeedConfig(written).precision
        else:
            self.config = to_evaluate(self.source)

    def load(self, device: Any, ema: bool, precision: str | None, batch: int, workers: int = 0):
        """The `Evaluator`, by default in the training's precision."""
        from ds_cmli.checkpoint.weights import load_student
        from ds_cmli.data.tokens import tokenizer_of
        from ds_cmli.engine import DTYPES, build_models
        from ds_cmli.evaluate.embed import Evaluator
        from ds_cmli.models.blocks import cast_buffers
        from ds_cmli.models.hf import AVERAGE, WEIGHTS

        if ema and self.source.weights:
            raise UserError(f"--ema has no effect with {self.source.name}: leave it out")
        words = tokenizer_of(self.config.data)
        if self.is_run:
            file = self.source.weights or (AVERAGE if ema else WEIGHTS)
            objective = load_student(self.source.path, self.config, file)
        else:
            objective, _ = build_models(self.config, words.vocab_size, pad_id=words.pad_id)
        dtype = DTYPES[precision or self.precision]
        cast_buffers(objective.student.image, dtype)  # as in training, by engine.build
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(dtype)
        objective = objective.to(device).eval()
        return Evaluator(objective, words, device, batch, workers, trained=self.trained)
