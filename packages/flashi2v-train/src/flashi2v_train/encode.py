"""`flashi2v-encode`: latents of clips and states of captions, written to a store ahead of training."""

import logging
from contextlib import closing
from pathlib import Path
from typing import Literal

from cyclopts import App, Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

import flashi2v_train
from flashi2v_data.atomic import check_directory
from flashi2v_data.console import configure_logging, importing, run
from flashi2v_data.engines.opening import open_engine
from flashi2v_data.errors import InputError
from flashi2v_npu_ops.installation import loading_told
from flashi2v_train import processes
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.options import FileOptions, LaunchOptions, TrainOptions, group_options

logger = logging.getLogger(__name__)


class StoreOptions(FileOptions):
    """What to encode, and where to."""

    output: Path = Field(description="directory of the store, made or added to; features_path of the data file")
    seed: int = Field(1024, description="of the run to come: it decides crops in time and mirroring")


class SpreadOptions(BaseModel):
    """Whether a Ray cluster encodes, with an actor for each device, or processes as of torchrun."""

    engine: Literal["local", "ray"] = Field("local", description="processes of torchrun's kind, or a Ray cluster")
    address: str | None = Field(
        None, description="HOST:PORT of a Ray cluster; default: RAY_ADDRESS, else one is started"
    )
    jobs: int | None = Field(None, ge=1, description="actors of --engine ray; default: as many as it has devices")

    @model_validator(mode="after")
    def _check_engine(self) -> "SpreadOptions":
        if self.engine == "local" and (self.address is not None or self.jobs is not None):
            raise ValueError("--address and --jobs are of --engine ray; processes are started by --nproc-per-node")
        return self


@Parameter(name="*")
class EncodeOptions(LaunchOptions, SpreadOptions, StoreOptions):
    """All options of `flashi2v-encode`."""

    model_config = ConfigDict(extra="forbid")


group_options(EncodeOptions, {StoreOptions: "Files", SpreadOptions: "Engine", LaunchOptions: "Processes"})


class Report(BaseModel):
    """What an encoding to its end has written, beside the store."""

    clips: int
    unreadable: list[str]
    captions: int
    empty_captions: int = 0
    cut_captions: int = 0
    captions_with_unknown_words: int = 0


app = App(
    name="flashi2v-encode",
    help="""Encode all clips and captions ahead of training.

    Training then needs neither the VAE nor the text encoder: set load_video_features and load_text_features true in
    the model file and the data file, and features_path to the output. Crops in time and mirroring are those of the
    first epoch. The command may be interrupted; started again it continues where it was.

    Example: flashi2v-encode --mm-model pretrain_model_flashi2v.json --mm-data data.json --output features
    """,
    help_format="plaintext",
    version=flashi2v_train.__version__,
)


@app.default
@loading_told()
def launch(*, options: EncodeOptions) -> None:
    check_directory(options.output, "--output")
    run_options = TrainOptions(
        mm_model=options.mm_model, mm_data=options.mm_data, seed=options.seed, device=options.device
    )
    config = read_run_config(run_options, encodes=True)
    if options.engine == "ray":
        if processes.is_started() or processes.needs_launch(options):
            raise InputError(
                "--engine ray starts its own processes: leave out torchrun's options (--nproc-per-node ...)"
            )
        _encode_spread(config, options)
    else:
        _encode_launched(config, options)
    if processes.is_first():
        from flashi2v_train.provenance import REPORT

        report = Report.model_validate_json((options.output / REPORT).read_text())
        logger.info(
            "done: %s holds %d clips and %d captions; %d videos could not be read",
            *(options.output, report.clips, report.captions, len(report.unreadable)),
        )


def _encode_launched(config: RunConfig, options: EncodeOptions) -> None:
    slurm = processes.adopt_slurm(options)
    if processes.is_started():
        processes.check_started(options)
    for note in (slurm, processes.set_ascend_environment(options.device)):
        if note is not None and processes.is_first():
            logger.info(note)
    if processes.needs_launch(options):
        processes.start(_encode, (config, options.output), options, preload="flashi2v_train.encoding")
    else:
        _encode(config, options.output)


def _encode_spread(config: RunConfig, options: EncodeOptions) -> None:
    configure_logging()
    with closing(open_engine("ray", options.address, options.jobs)) as engine:
        with importing():
            from flashi2v_train.encode_spread import encode_spread

        encode_spread(config, options.output, engine)


def _encode(config: RunConfig, output: Path) -> None:
    configure_logging(logging.INFO if processes.is_first() else logging.WARNING)
    # Imported here: torch and the encoders take seconds, and a wrong option should be reported at once.
    with importing():
        from flashi2v_train.encoding import encode

    encode(config, output)


def main() -> None:
    """Run the command line."""
    run(app)
