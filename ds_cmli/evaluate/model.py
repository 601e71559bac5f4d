"""The model that is evaluated: a run, one of its files of weights, or what training starts from."""

from dataclasses import replace
from typing import Any

from ds_cmli.common import UserError, read_json
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import load_config
from ds_cmli.config.source import RUN, Source, to_evaluate


class EvaluatedModel:
    def __init__(self, name: str, is_run: bool) -> None:
        """Read its configuration, without torch. Raises `UserError`."""
        self.source, self.precision = Source(name), "fp32"
        self.is_run = is_run or self.source.has_own_data
        if self.is_run:
            self.config = load_config(self.source.path / RUN, "--checkpoint")
            written = read_json(self.source.path / RUN).get("deepspeed", {})
            self.precision = DeepSpeedConfig(written).precision
        else:
            self.config = to_evaluate(self.source)

    def load(
        self, device: Any, ema: bool, precision: str | None, batch: int, workers: int = 0
    ) -> Any:
        """The `Evaluator`, by default in the training's precision. Raises `UserError`."""
        from ds_cmli.data.tokens import tokenizer_of
        from ds_cmli.engine import DTYPES, build_models
        from ds_cmli.evaluate.embed import Evaluator
        from ds_cmli.losses.objective import Objective
        from ds_cmli.models import hf
        from ds_cmli.models.blocks import cast_buffers

        if ema and self.source.weights:
            raise UserError(f"--ema has no effect with {self.source.name}: leave it out")
        words, trained = tokenizer_of(self.config.data), self.is_run or self.source.is_run
        if trained:
            file = self.source.weights or (hf.AVERAGE if ema else hf.WEIGHTS)
            model = hf.load(self.source.path, file)
            weights = dict(model.config.losses) or {"global": 1.0}  # a distillation has none
            loss = replace(self.config.loss, weights=weights, start={})
            objective = Objective(model.student, loss)
            objective.losses.load_state_dict(model.losses.state_dict(), strict=False)
        else:
            objective, _ = build_models(self.config, words.vocab_size, pad_id=words.pad_id)
        dtype = DTYPES[precision or self.precision]
        cast_buffers(objective.student.image, dtype)  # as in training, by engine.build
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(dtype)
        objective = objective.to(device).eval()
        return Evaluator(objective, words, device, batch, workers, trained=trained)
