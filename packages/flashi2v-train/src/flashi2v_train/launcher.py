"""`flashi2v-train`: check everything, then train here or in processes of its own."""

import logging
import os
import uuid

from cyclopts import App

import flashi2v_train
from flashi2v_data.console import configure_logging, run
from flashi2v_data.errors import InputError
from flashi2v_model import InputError as ModelInputError
from flashi2v_npu_ops import UnsupportedError
from flashi2v_train.config import RunConfig, TrainOptions, read_run_config

logger = logging.getLogger(__name__)

USER_ERRORS = (InputError, ModelInputError, UnsupportedError)

app = App(
    name="flashi2v-train",
    help="""Train FlashI2V.

    The run's directory (--save) holds metrics.jsonl, TensorBoard events, config.json and checkpoints; starting the
    same command again resumes from the newest one.

    Example: flashi2v-train --mm-model pretrain_model_flashi2v.json --mm-data data.json --save runs/first --bf16
    """,
    help_format="plaintext",
    version=flashi2v_train.__version__,
)


@app.default
def launch(*, options: TrainOptions) -> None:
    config = read_run_config(options)
    inside = "RANK" in os.environ  # torchrun has started the processes
    if inside and options.nproc_per_node > 1:
        raise InputError("--nproc-per-node starts processes of its own: leave it out inside torchrun")
    if not inside:
        config.accumulation(options.nproc_per_node)
    for note in config.notes() if _is_first() else []:
        logger.info(note)
    if options.nproc_per_node > 1:
        _launch_processes(config)
    else:
        _train(config)
    if _is_first():
        logger.info("done: %s", options.save)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _launch_processes(config: RunConfig) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.options.nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(launcher, _train)(config)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # An exception comes as a record; a killed process has only a line about its signal.
        words = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        kind, _, message = words.partition(": ")
        if kind in (cls.__name__ for cls in USER_ERRORS):
            raise InputError(message) from None
        raise RuntimeError(f"process {rank} failed: {words}") from None


def _train(config: RunConfig) -> None:
    # What all processes would say alike is said by the first.
    configure_logging(logging.INFO if _is_first() else logging.WARNING)
    # Imported here: torch and the encoders take seconds, and a wrong option should be told at once.
    from flashi2v_train.trainer import train

    train(config)


def main() -> None:
    """Run the command line."""
    run(app, errors=USER_ERRORS)
