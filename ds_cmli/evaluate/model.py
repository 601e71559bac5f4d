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

    def load(self, tokenizer: Any, ema: bool, precision: str | None, device: Any) -> Any:
        """The `Objective` with student and temperatures, of the training's precision by default."""
        from ds_cmli.checkpoint.weights import load_student
        from ds_cmli.engine import DTYPES, build_models
        from ds_cmli.models.blocks import cast_buffers
        from ds_cmli.models.hf import AVERAGE, WEIGHTS

        if ema and self.source.weights:
            raise UserError(f"--ema has no effect with {self.source.name}: leave it out")
        if self.is_run:
            file = self.source.weights or (AVERAGE if ema else WEIGHTS)
            objective = load_student(self.source.path, self.config, file)
        else:
            sizes = self.config, tokenizer.vocab_size
            objective, _ = build_models(*sizes, special=tokenizer.special)
        dtype = DTYPES[precision or self.precision]
        cast_buffers(objective.student.image, dtype)  # as in training, by engine.build
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(dtype)
        return objective.to(device).eval()
