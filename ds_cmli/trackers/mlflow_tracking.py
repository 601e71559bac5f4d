"""MLflow, configured by its own environment variables.

Among them are MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import logging
import os
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from numpy import ndarray

from ds_cmli import trackers
from ds_cmli.common.errors import UserError, first_line

LONGEST = 500  # characters; MLflow limits the length of a setting's value


class MLflow:
    """A resumed run continues the same MLflow run, whose id `mlflow/run-id` in its folder keeps."""

    errors = (Exception,)

    def __init__(self, folder: Path, first_step: int):
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # Several threads may make the same folder of a store at once, and what one logs is lost.
        os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
        try:
            if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
                mlflow.set_experiment("ds-cmli")
            file = folder / "mlflow" / "run-id"
            if file.is_file():
                mlflow.start_run(run_id=file.read_text().strip())
                return
            run = mlflow.start_run(run_name=folder.resolve().name)
            trackers.kept_id(folder / "mlflow", run.info.run_id)
            settings = trackers.settings(folder).items()
            mlflow.log_params({name: str(value)[:LONGEST] for name, value in settings})
        except (OSError, ImportError, MlflowException) as error:
            raise UserError(
                f"run.report_to has 'mlflow', which cannot be opened: {first_line(error)}: "
                "see MLFLOW_TRACKING_URI"
            ) from None

    def numbers(self, step: int, values: dict[str, float]) -> None:
        # Not synchronous, as a slow server must not hold up the step.
        mlflow.log_metrics(values, step=step, synchronous=False)

    def picture(self, step: int, name: str, image: ndarray) -> None:
        # For a picture a store of files is read whole, and the numbers' files may still be empty.
        mlflow.flush_async_logging()
        # Pictures are few, and MLflow's threads for them may make one folder at once and lose one.
        mlflow.log_image(image, key=name.replace("/", "."), step=step, synchronous=True)

    def close(self) -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()
