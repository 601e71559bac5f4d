"""Train as ds_cmli/train.py does, with the losses of `profiling/learning/losses.py` as well.

Other processes do not know them: neither memory's prediction (--dry-run) nor evaluation and export.
"""

from ds_cmli.config.registry import LOSSES, TARGET, LossEntry

OF_THE_EXPERIMENT = {
    "oracle_text": LossEntry(
        "profiling.learning.losses:OracleText", teacher=True, settings=("mse_reduction", *TARGET)
    ),
    "shuffled_text": LossEntry(
        "profiling.learning.losses:ShuffledText", teacher=True, settings=("mse_reduction", *TARGET)
    ),
}


def register() -> None:
    """Add the losses to the package's table, for this process."""
    LOSSES.update(OF_THE_EXPERIMENT)


if __name__ == "__main__":
    from ds_cmli import train

    register()
    train.main()
