"""The plugin that registers the losses of `profiling/learning/losses.py`."""

from ds_cmli.config.registry import LOSSES, TARGET, LossEntry

for name, loss in (("oracle_text", "OracleText"), ("shuffled_text", "ShuffledText")):
    LOSSES[name] = LossEntry(
        f"profiling.learning.losses:{loss}", teacher=True, settings=("mse_reduction", *TARGET)
    )
