"""`flashi2v-train`: check everything, then train here or in processes of its own."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

import flashi2v_train
from flashi2v_data.console import configure_logging, escaped, importing, run
from flashi2v_data.errors import InputError
from flashi2v_npu_ops.installation import loading_told
from flashi2v_train import processes
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.splits import check_split, suggest_split
from flashi2v_train.start.options import InitOptions

if TYPE_CHECKING:
    from flashi2v_train.recipe import RecipeClass

logger = logging.getLogger(__name__)

_HELP = """Train FlashI2V.

The run's directory (--save) holds metrics.jsonl, TensorBoard events, config.json and checkpoints; starting the same
command again resumes from the newest one. SIGTERM and SIGUSR1 let the step end, save and stop.

Example: flashi2v-train --mm-model pretrain_model_flashi2v.json --mm-data data.json --save runs/first --bf16
"""


def command(recipe: "RecipeClass | None" = None) -> App:
    """Return the command line, for a recipe or for what `--recipe` names."""
    app = App(name="flashi2v-train", help=_HELP, help_format="plaintext", version=flashi2v_train.__version__)

    @app.default
    def launch(*, options: TrainOptions) -> None:
        _launch(options, recipe)

    app.command(init)
    app.command(status)
    return app


def init(run: Path, /, *, options: Annotated[InitOptions, Parameter(name="*")]) -> None:
    """Write the files of a run on your own videos: filter.yaml, data.json, model.json and run.sh.

    The videos are opened; size, frames and batch are proposed that fit them and the device's memory. `bash RUN/run.sh`
    then goes all the way to a model, a film strip and the command to sample with.

    Example: flashi2v-train init runs/mine --videos videos --from demo

    Parameters
    ----------
    run
        A new directory.
    """
    from flashi2v_train.start.command import prepare

    print(escaped(prepare(run, options)))


def status(run: Path, /) -> None:
    """Print where a run is: running or not, step, loss, time left, and how good it is on held-out clips.

    Example: flashi2v-train status runs/first

    Parameters
    ----------
    run
        The run's directory, as --save names it.
    """
    from flashi2v_train.status import describe

    print(escaped(describe(run)))


app = command()


@loading_told()
def _launch(options: TrainOptions, recipe: "RecipeClass | None") -> None:
    if options.optimizer_selection == "fused_ema_adamw" and not options.use_ema:
        raise InputError("--optimizer-selection fused_ema_adamw contradicts --no-use-ema: leave one of them out")
    config = read_run_config(options, recipe=recipe)
    slurm = processes.adopt_slurm(options)
    if processes.is_started():
        processes.check_started(options)
    every_dims = [config.parallel_dims(size) for size in processes.world_sizes(options)]
    if not options.suggest_split:  # for which the batch does not matter
        for dims in every_dims:
            config.micro_batches(dims)
    if options.dry_run or options.suggest_split:
        if processes.is_first():
            _answer(config, every_dims[-1])
        return
    uneven = check_split(config, every_dims[-1])
    ascend = processes.set_ascend_environment(options.device)
    found = [note for note in (slurm, ascend, uneven) if note is not None]
    for note in [*found, *options.notes(), *config.notes()] if processes.is_first() else []:
        logger.info(note)
    if processes.needs_launch(options):
        processes.start(_train, (config,), options, preload="flashi2v_train.trainer")
    else:
        _train(config)
    if processes.is_first():
        logger.info("done: %s", options.save)


def _answer(config: RunConfig, dims: ParallelDims) -> None:
    from flashi2v_model.weights.libraries import quieten

    quieten()
    if config.options.dry_run:
        from flashi2v_train.dry_run import describe_run, missing_files

        print(describe_run(config, dims))
        if (missing := missing_files(config)) is not None:
            print(f"\n{missing}")
            raise InputError("--dry-run: files are missing: they are listed below the plan")
    if config.options.suggest_split:
        print(suggest_split(config, dims))


def _train(config: RunConfig) -> None:
    started = time.monotonic()
    # What all processes would log alike, the first one logs.
    configure_logging(logging.INFO if processes.is_first() else logging.WARNING)
    # Imported here: the encoders take seconds, and a wrong option should be reported at once.
    with importing():
        from flashi2v_train.trainer import train

    train(config, started)


def main(recipe: "RecipeClass | None" = None) -> None:
    """Run the command line.

    Args:
        recipe: what is learnt; the default is what `--recipe` names, or FlashI2V's own. A file that ends in
            `main(MyRecipe)`, under `if __name__ == "__main__"`, is a `flashi2v-train` of its own.
    """
    run(app if recipe is None else command(recipe))
