"""The reference's files and scripts, under their names: the real schemas read them, the real options fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.errors import InputError
from flashi2v_data.loading.config import DataConfig
from flashi2v_data.records import read_annotations
from flashi2v_data.settings import load_config
from flashi2v_infer.config import InferenceConfig
from flashi2v_train.config import RunConfig, TrainModelConfig
from flashi2v_train.options import TrainOptions

ROOT = Path(__file__).parents[2]
FLASHI2V = ROOT / "examples/flashi2v"


@pytest.mark.parametrize(
    ("name", "schema"),
    {
        "1.3b/pretrain_model_flashi2v.json": TrainModelConfig,
        "1.3b/data.json": DataConfig,
        "1.3b/inference_model.json": InferenceConfig,
        "filter_config.yaml": FilterConfig,
    }.items(),
)
def test_the_files_fit_their_schemas(name, schema):
    load_config(FLASHI2V / name, schema)


def test_the_files_that_files_name_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="line 1: no such meta JSON: /data/"):  # the user's, not ours
        read_annotations(load_config(FLASHI2V / "filter_config.yaml", FilterConfig).ann_txt_path)
    sampling = load_config(FLASHI2V / "1.3b/inference_model.json", InferenceConfig)
    prompts, images = (Path(path).read_text().splitlines() for path in (sampling.prompt, sampling.image))
    assert len(prompts) == len(images) > 0


def arguments(tmp_path: Path, script: str, *words: str, **environment: str) -> list[str]:
    """What a script passes to the command it calls."""
    for name in ("flashi2v-train", "flashi2v-infer"):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\nfor word in "$(basename "$0")" "$@"; do echo "$word"; done\n')
        fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", FLASHI2V / script, *words], cwd=ROOT, env={**os.environ, **path, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def parse(words: list[str]) -> TrainOptions:
    app, found = App(), []

    @app.default
    def collect(*, options: TrainOptions) -> None:
        found.append(options)

    app(words, exit_on_error=False, print_error=False, result_action="return_value")
    return found[0]


@pytest.mark.parametrize(
    ("settings", "world_size"), [({}, 8), ({"PP": "4", "NNODES": "2", "GLOBAL_BATCH_SIZE": "32"}, 16), ({"CP": "2"}, 8)]
)
def test_the_training_script_passes_options_that_fit_each_other_and_its_files(
    tmp_path, monkeypatch, settings, world_size
):
    monkeypatch.chdir(ROOT)
    name, *words = arguments(tmp_path, "1.3b/pretrain_ddp.sh", "--compile", **settings)
    assert name == "flashi2v-train"
    options = parse(words)
    assert options.compile
    assert options.notes() == []  # all of them have a meaning
    config = RunConfig(
        options, load_config(options.mm_model, TrainModelConfig), load_config(options.mm_data, DataConfig)
    )
    if options.pipeline_model_parallel_size == 4:
        assert config.parallel_dims(world_size).layers == (7, 8, 8, 7)
    config.micro_batches(config.parallel_dims(world_size))


def test_the_training_script_logs_to_wandb_when_asked(tmp_path):
    words = arguments(tmp_path, "1.3b/pretrain_ddp.sh", WANDB_PROJECT="videos", SAVE="runs/first")
    options = parse(words[1:])
    assert (options.wandb_project, options.wandb_save_dir) == ("videos", Path("runs/first"))
    assert options.load == options.save == Path("runs/first")


def test_the_sampling_script_names_its_file(tmp_path):
    words = arguments(tmp_path, "1.3b/inference.sh", "--seed", "1")
    assert words == ["flashi2v-infer", "--mm-model", "examples/flashi2v/1.3b/inference_model.json", "--seed", "1"]


def test_the_filter_script_is_the_filter_command(tmp_path):
    script = FLASHI2V / "filter_data.py"
    done = subprocess.run(
        [sys.executable, script, "--filter_config", tmp_path / "absent.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("flashi2v-data: ")
    assert "absent.yaml" in done.stderr
