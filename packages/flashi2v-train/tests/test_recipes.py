"""The page docs/change-what-it-learns.md, run as it stands: in one process, on two with FSDP2, and in a pipeline."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
import pytest
import torch
from PIL import Image

import flashi2v_train
from flashi2v_data.errors import InputError
from flashi2v_data.store.reader import open_store, write_store
from flashi2v_model.cli import convert, inspect
from flashi2v_model.errors import InputError as ModelInputError
from flashi2v_model.weights.reading import read_state_dict
from flashi2v_train import encode
from flashi2v_train.config import read_run_config
from flashi2v_train.options import TrainOptions

PAGE = Path(__file__).parents[3] / "docs/change-what-it-learns.md"
# A step is trained behind the validation, which shows videos and so loads the VAE.
STEPS, SAVED_AT = 3, 2
PARALLEL = {
    "one": (1, {}),
    "FSDP 2": (2, {"nproc_per_node": 2}),
    "pipeline 2": (2, {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}),
}
RECIPES = {
    "own": None,
    "huber": "huber:Huber",
    "motion": "motion:MotionTransformer",
    "shift": "ablations:ShiftOnly",
    "fourier": "ablations:FourierOnly",
    "concatenated": "ablations:RepeatAndConcatenate",
    "weighted": "flashi2v_train:MotionWeighted",
}
ADDED = {"motion_embedder.weight", "motion_embedder.bias"}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A directory with the page's files."""
    directory = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for name, code in blocks:
        (directory / name).write_text(code)
    assert [name for name, _ in blocks] == ["huber.py", "motion.py", "sample.py", "ablations.py"]
    return directory


def test_every_example_is_short(page):
    for path in page.glob("*.py"):
        for part in path.read_text().split("\n\n\nclass "):
            assert len([line for line in part.splitlines() if line.strip()]) < 30, path.name


class Case(NamedTuple):
    name: str
    num_processes: int
    port: int
    options: TrainOptions


def work(rank: int, cases: list[Case], page: Path) -> None:
    from flashi2v_train.trainer import train

    torch.set_num_threads(1)
    os.chdir(page)
    for case in cases:
        if rank >= case.num_processes:
            continue
        size = str(case.num_processes)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(case.port)}
        try:
            train(read_run_config(case.options))
        except Exception as error:
            raise RuntimeError(case.name) from error


@pytest.fixture(scope="module")
def world(tmp_path_factory, new_workspace, inputs):
    """Workspace and changes: records with a motion score, features encoded ahead."""
    root = tmp_path_factory.mktemp("recipes")
    workspace = new_workspace(root)
    store = open_store(inputs / "store")
    records = [{**store[i], "motion_score": i / 8, "camera": [i, 2, 3.5]} for i in range(len(store))]
    changes = {
        "data.dataset_param.metafile_or_dir_path": str(write_store(root / "scored.lmdb", records, store.config)),
        "data.dataset_param.columns": ["motion_score"],
        "data.dataset_param.text_drop_ratio": 0.0,
        "model.predictor.num_layers": 2,
    }
    encode.launch(options=encode.EncodeOptions(**workspace.files(changes), output=root / "features", device="cpu"))
    return workspace, changes | workspace.loaded | {"data.dataset_param.features_path": str(root / "features")}


@pytest.fixture(scope="module")
def runs(world, page, free_ports, tmp_path_factory) -> dict[tuple[str, str], Path]:
    workspace, changes = world
    root, cases, found = tmp_path_factory.mktemp("runs"), [], {}
    ports = iter(free_ports(len(RECIPES) * len(PARALLEL)))
    for name, reference in RECIPES.items():
        workspace.directory = root / name
        workspace.directory.mkdir()
        files = workspace.files(changes | ({"model.recipe": {"delta": 0.5}} if name == "huber" else {}))
        for parallel, (num_processes, degrees) in PARALLEL.items():
            save = found[name, parallel] = root / f"{name} {parallel}"
            options = TrainOptions(
                **files,
                device="cpu",
                save=save,
                recipe=reference,
                lr=1e-2,
                ema_decay=0.5,
                train_iters=STEPS,
                global_batch_size=4,
                micro_batch_size=2,
                save_interval=SAVED_AT,
                eval_interval=SAVED_AT,
                eval_iters=2,
                eval_videos=1,
                eval_steps=2,
                distributed_timeout_minutes=5,  # where one process fails, the other waits for it no longer
                **degrees,
            )
            cases.append(Case(f"{name}, {parallel}", num_processes, next(ports), options))
    forked.call("flashi2v-train", 2, work, cases, page)
    return found


def read(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_computes_the_same_on_every_number_of_processes(runs, name):
    one = runs[name, "one"]
    assert len(read(one)) == STEPS
    for parallel in ("FSDP 2", "pipeline 2"):
        other = runs[name, parallel]
        for ours, theirs in zip(read(one), read(other), strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        for ours, theirs in zip(read(one, "validation.jsonl"), read(other, "validation.jsonl"), strict=True):
            losses = [name for name in ours if name.startswith("validation_loss")]
            assert [theirs[name] for name in losses] == pytest.approx([ours[name] for name in losses], rel=1e-4)
        assert (other / f"validation/step_000000{SAVED_AT}/video_0.mp4").is_file()


def test_every_recipe_computes_something_else(runs):
    last = [read(runs[name, "one"])[-1]["loss"] for name in RECIPES]
    assert len({round(loss, 5) for loss in last}) == len(RECIPES)
    own, huber = (read(runs[name, "one"], "validation.jsonl")[0]["validation_loss"] for name in ("own", "huber"))
    assert huber < own / 2  # half of the square where errors are small, and less where they are not


def test_a_run_remembers_its_recipe_and_resumes_with_it_alone(runs, world, page, monkeypatch):
    config = json.loads((runs["huber", "one"] / "config.json").read_text())
    assert (config["options"]["recipe"], config["model"]["recipe"]) == ("huber:Huber", {"delta": 0.5})
    run = runs["motion", "FSDP 2"]
    before = read(run)
    (run / "latest_checkpointed_iteration.txt").write_text(f"{SAVED_AT}\n")  # saved by two processes, taken up by one
    workspace, changes = world
    monkeypatch.chdir(page)
    from flashi2v_train.trainer import train

    def again(**values: object) -> None:
        options = {"device": "cpu", "save": run, "lr": 1e-2, "ema_decay": 0.5, "train_iters": STEPS, **values}
        batch = {"global_batch_size": 4, "micro_batch_size": 2}
        train(read_run_config(TrainOptions(**workspace.files(changes), **options, **batch)))

    with pytest.raises(InputError, match=r"the checkpoint alone has .*motion_embedder"):
        again()
    again(recipe="motion:MotionTransformer")
    assert read(run)[-1]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-5)
    assert {*read_state_dict(run)} > ADDED


def test_a_variant_is_converted_and_sampled_by_its_class_alone(runs, inputs, page, tmp_path, monkeypatch, capsys):
    run, model = runs["motion", "one"], tmp_path / "model"
    monkeypatch.chdir(page)
    with pytest.raises(ModelInputError, match=r"is of a 'MotionTransformer'.*--recipe"):
        convert(run, model, to="diffusers")
    with pytest.raises(ModelInputError, match=r"npu layout has no place for motion_embedder.weight, motion_embedder"):
        convert(run, tmp_path / "npu.pt", to="npu", recipe="motion:MotionTransformer")
    convert(run, model, to="diffusers", encoders=inputs / "model", recipe="motion:MotionTransformer")
    assert {*read_state_dict(model)} > ADDED
    data = json.loads((run / "config.json").read_text())["data"]["dataset_param"]
    size = {"num_frames": data["sample_num_frames"], "height": data["sample_height"], "width": data["sample_width"]}
    written = json.loads((model / "model_index.json").read_text())["defaults"]
    assert written == {**size, "fps": 16.0, "num_inference_steps": 50, "guidance_scale": 5.0}
    assert re.search(r"trained: \d+ steps on `", (model / "README.md").read_text())
    with pytest.raises(ModelInputError, match="is of a 'MotionTransformer'"):
        inspect(model / "transformer")
    inspect(model / "transformer", recipe="motion:MotionTransformer")
    assert "layout               diffusers\n" in capsys.readouterr().out
    monkeypatch.syspath_prepend(page)
    from sample import load, sample

    from flashi2v_infer import FlashI2VPipeline

    with pytest.raises(ModelInputError, match="is of a 'MotionTransformer'"):
        FlashI2VPipeline.from_pretrained(model)
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    numbers = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}

    def latents(score: object, **more: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        image = torch.full((3, 32, 32), 0.5)
        return sample(pipe, image, "a red circle", score, generator=generator, **numbers, **more)

    still, moving = latents(0.0), latents(1.0)
    assert not torch.allclose(still, moving)
    torch.testing.assert_close(latents(torch.tensor([1.0])), moving)
    torch.testing.assert_close(latents(1.0, cfg_batch=True), moving, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["transformer"] == ["flashi2v_model.transformer", "FlashI2VTransformer3DModel"]
    pipe = load(tmp_path / "again")
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(1.0), moving)
    with pytest.raises(ValueError, match="MotionTransformer asks for motion_score, got none"):
        pipe(image=torch.zeros(3, 32, 32), prompt="a red circle", **numbers)


def test_the_command_samples_a_variant_and_its_record_says_how(runs, inputs, page, tmp_path, monkeypatch, capsys):
    from flashi2v_infer import cli, read_record

    monkeypatch.chdir(page)
    model, image, output = tmp_path / "model", tmp_path / "image.png", tmp_path / "video.mp4"
    convert(runs["motion", "one"], model, to="diffusers", encoders=inputs / "model", recipe="motion:MotionTransformer")
    Image.new("RGB", (32, 32), "red").save(image)
    size = ["--num-frames", "5", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--device", "cpu"]
    words = ["--model", str(model), "--image", str(image), "--prompt", "a red circle", "-o", str(output), *size]

    def infer(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    variant = ("--recipe", "motion:MotionTransformer")
    assert infer() == 2
    assert "is of a 'MotionTransformer'" in capsys.readouterr().err
    assert infer(*variant, "--conditioning", "motion_score") == 2
    assert "must be NAME=NUMBER" in capsys.readouterr().err
    assert infer(*variant) == 2
    assert "asks for motion_score, got none" in capsys.readouterr().err
    assert not output.exists()
    assert infer(*variant, "--conditioning", "motion_score=0.7") == 0
    record = read_record(output)
    assert record["settings"]["conditioning"] == {"motion_score": 0.7}
    assert record["model_settings"]["network"] == {"recipe": "motion:MotionTransformer"}


def test_a_network_without_parameters_of_its_own_is_not_taken_for_flashi2v(runs, tmp_path, page, monkeypatch):
    """Its weights would fit, and sample something else in silence."""
    monkeypatch.chdir(page)
    run = runs["fourier", "one"]
    with pytest.raises(ModelInputError, match="is of a 'FourierOnly'"):
        convert(run, tmp_path / "model", to="diffusers")
    with pytest.raises(ModelInputError, match="main layout cannot say that the weights are those of a FourierOnly"):
        convert(run, tmp_path / "main.pt", to="main", recipe="ablations:FourierOnly")
    for name in ("fourier", "shift", "concatenated"):
        reference = RECIPES[name]
        convert(runs[name, "one"], tmp_path / name, to="diffusers", recipe=reference)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["_class_name"] == reference.partition(":")[2]


def test_a_variant_starts_from_weights_of_flashi2v(runs, world, page, tmp_path, monkeypatch, caplog):
    convert(runs["own", "one"], tmp_path / "start", to="diffusers")
    workspace, changes = world
    monkeypatch.chdir(page)
    caplog.set_level("INFO")
    files = workspace.files(changes | {"model.predictor.from_pretrained": str(tmp_path / "start")})
    options = {"recipe": "motion:MotionTransformer", "train_iters": 1, "lr": 1e-9, "save": tmp_path / "run"}
    from flashi2v_train.trainer import train

    train(read_run_config(TrainOptions(**files, device="cpu", **options)))
    assert "keep their start values: motion_embedder.weight, motion_embedder.bias" in caplog.text
    trained, start = read_state_dict(tmp_path / "run", ema=False), read_state_dict(tmp_path / "start")
    for name, tensor in start.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_file_that_ends_in_main_is_a_command_of_its_own(world, page, tmp_path):
    """On two processes, which import the file anew."""
    workspace, changes = world
    arguments = workspace.arguments(changes, train_iters=1, save=tmp_path / "run", nproc_per_node=2, eval_interval=1)
    done = subprocess.run([sys.executable, page / "huber.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["options"]["recipe"] == "huber:Huber"


def test_the_weight_of_motion_is_that_of_what_has_changed():
    latents, condition = torch.randn(2, 16, 3, 4, 5), torch.randn(2, 16, 1, 4, 5)
    latents[:, :, 1] = condition[:, :, 0]  # nothing has changed in the second
    noise, velocity = torch.randn_like(latents), torch.randn_like(latents)
    batch = {"latents": latents, "condition": condition, "noise": noise}
    errors, found = (velocity - (noise - latents)) ** 2, {}
    for weight in (0.0, 3.0):
        recipe = flashi2v_train.MotionWeighted(flashi2v_train.MotionWeighted.Settings(motion_weight=weight))
        found[weight] = recipe.loss(velocity, recipe.target(batch))
    torch.testing.assert_close(found[0.0], errors.mean(dim=(1, 2, 3, 4)))
    expected = torch.zeros(2)
    for b, f, h, w in np.ndindex(2, 3, 4, 5):
        change = sum(float(latents[b, c, f, h, w] - condition[b, c, 0, h, w]) ** 2 for c in range(16)) / 16
        place = 1 if f == 0 else (1 + 3 * change / (change + 0.2)) / 4
        expected[b] += place * errors[b, :, f, h, w].mean() / (3 * 4 * 5)
    torch.testing.assert_close(found[3.0], expected)
    assert (recipe.target(batch)["weight"][:, :, 1] == 0.25).all()


BAD_INPUT = {
    "no colon": ({}, "huber", "must be module:Class"),
    "no module": ({}, "nowhere:Huber", "No module named 'nowhere'"),
    "no class": ({}, "huber:Hubert", "huber has no class Hubert"),
    "another class": ({}, "collections:Counter", "Counter is no flashi2v_train.Recipe"),
    "unknown setting": ({"model.recipe": {"dleta": 1.0}}, "huber:Huber", "recipe: dleta: unknown key, did you mean"),
    "wrong setting": ({"model.recipe": {"delta": "much"}}, "huber:Huber", "recipe: delta"),
    "settings of nothing": ({"model.recipe": {"delta": 1.0}}, None, "no --recipe names what they are for"),
    "no column": ({"data.dataset_param.columns": []}, "motion:MotionTransformer", "asks for 'motion_score'"),
    "a name that is taken": ({"data.dataset_param.columns": ["noise"]}, "huber:Huber", "two tensors named 'noise'"),
    "a weight below zero": ({"model.recipe": {"motion_weight": -1}}, "flashi2v_train:MotionWeighted", "motion_weight"),
    "length": ({"data.dataset_param.columns": {"camera": 0}}, None, "columns.camera"),
    "a loss for all": ({}, "wrong:Mean", r"must be one number per sample, \(B,\): got \(\)"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_what_does_not_fit_is_one_line_before_anything_starts(world, page, case, monkeypatch):
    workspace, changes = world
    changed, recipe, words = BAD_INPUT[case]
    monkeypatch.chdir(page)
    (page / "wrong.py").write_text(
        "from flashi2v_train import Recipe\n\n\nclass Mean(Recipe):\n    def loss(self, velocity, target):\n"
        "        return (velocity - target['velocity']).square().mean()\n"
    )
    with pytest.raises(ValueError, match=words):
        read_run_config(TrainOptions(**workspace.files(changes | changed), device="cpu", recipe=recipe))


def test_the_package_shows_its_public_names_and_imports_nothing_heavy_for_it():
    code = (
        "import sys, flashi2v_train as package, flashi2v_train.launcher\n"
        "assert {'Recipe', 'Trainer', 'main', 'train'} < {*package.__all__} <= {*dir(package)}\n"
        "assert not {'torch', 'diffusers'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(callable(getattr(flashi2v_train, name)) for name in flashi2v_train.__all__)
