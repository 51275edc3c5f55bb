"""Validation against direct computations, one process and several, and what it leaves to look at."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import forked
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flashi2v_data import FeatureWriter, FlashI2VDataset, generator, open_store
from flashi2v_data.errors import InputError
from flashi2v_data.loading.loader import Batch as LoadedBatch
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.store.features import video_key
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.encoders import decode_video, encode_text, encode_video, load_text_encoder, load_vae
from flashi2v_model.scheduler import NUM_TIMESTEPS, euler_scheduler, inference_sigmas, interpolate
from flashi2v_train.batch import Batch, join
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.engines import DirectEngine, PipelineEngine
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.parallelise import Stage, keep_layers, parallelise
from flashi2v_train.validation import SIGMAS, Validation
from flashi2v_train.world import World, join_world

VIDEOS = 8  # in the store
# The untrained VAE's latents are flat: without detail the cut-off would not matter.
DETAIL = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
DEFAULTS = {
    "device": "cpu",
    "micro_batch_size": 2,
    "eval_interval": 1,
    "eval_iters": 2,
    "eval_videos": 0,
    "eval_steps": 3,
}


def make_config(workspace, changes=None, **options) -> RunConfig:
    files = workspace.files(changes)
    return read_run_config(TrainOptions(**files, **{**DEFAULTS, "save": workspace.directory / "run", **options}))


def make_transformer(config: RunConfig) -> FlashI2VTransformer3DModel:
    """One in which no layer is idle: the new ones start at zero."""
    torch.manual_seed(0)
    transformer = FlashI2VTransformer3DModel(**config.model.predictor.transformer_arguments())
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return transformer


class Encoders:
    """The frozen encoders, and what they were asked."""

    def __init__(self, config: RunConfig) -> None:
        self.vae = load_vae(config.model.ae, torch.device("cpu"))
        self.text_encoder = load_text_encoder(config.model.text_encoder, torch.device("cpu"))
        self.captions: list[str] = []
        self.decoded: list[Tensor] = []

    def encode(self, batch: LoadedBatch) -> Batch:
        self.captions += batch["caption"]
        return join(
            [
                {
                    "latents": encode_video(self.vae, video[None]),
                    "condition": encode_video(self.vae, video[None, :, :1]) + DETAIL,
                    "text": encode_text(self.text_encoder, ids[None], mask[None]),
                }
                for video, ids, mask in zip(batch["video"], batch["prompt_ids"], batch["prompt_mask"])
            ]
        )

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return decode_video(self.vae, latents)


@pytest.fixture
def world():
    """This process, alone."""
    with join_world("cpu", ParallelDims(1, 1, 1, 1, 1, (2,))) as world:
        yield world


def make_validation(config: RunConfig, world: World) -> tuple[Validation, Encoders, FlashI2VTransformer3DModel]:
    encoders, transformer = Encoders(config), make_transformer(config)
    engine = DirectEngine(Stage(transformer, config.latent_shape), config.recipe)
    return Validation(config, world, engine.velocity, encoders.encode, encoders.decode), encoders, transformer


def sample(config: RunConfig, number: int, text_drop_ratio: float = 0.0) -> tuple[SampleKey, LoadedBatch]:
    changes = {"text_drop_ratio": text_drop_ratio, "load_video_features": False, "features_path": None}
    param = config.data.dataset_param.model_copy(update=changes)
    dataset = FlashI2VDataset(open_store(param.metafile_or_dir_path), param, seed=config.options.seed)
    key = SampleKey(*divmod(number, VIDEOS))
    whole = dataset[key]
    tensors = {name: whole[name][None] for name in ("video", "prompt_ids", "prompt_mask")}
    return key, {**tensors, "caption": [whole["caption"]]}


def noise_of(config: RunConfig, key: SampleKey) -> Tensor:
    return torch.randn(config.latent_shape, generator=generator(config.options.seed, "validation noise", *key))[None]


@torch.no_grad()
def direct_losses(config: RunConfig, num_samples: int) -> list[float]:
    """The loss at every sigma, sample by sample, from the mathematics."""
    transformer, encoders = make_transformer(config), Encoders(config)
    errors = torch.zeros(len(SIGMAS), num_samples)
    for number in range(num_samples):
        key, batch = sample(config, number)
        features, noise = encoders.encode(batch), noise_of(config, key)
        ratio = 0.05 + 0.9 * torch.rand(1, generator=generator(config.options.seed, "validation ratio", *key))
        for row, sigma in enumerate(SIGMAS):
            noisy = interpolate(features["latents"], noise, torch.tensor([sigma]))
            timestep = NUM_TIMESTEPS * torch.tensor([sigma])
            velocity = transformer(noisy, timestep, features["text"], features["condition"], ratio).sample
            errors[row, number] = (velocity - (noise - features["latents"])).square().mean()
    return errors.mean(dim=1).tolist()


def test_the_loss_is_the_mean_over_samples_at_fixed_sigmas_and_the_same_every_time(workspace, world):
    """More samples than the store has, so that some are seen in a second epoch; text is dropped in training alone."""
    config = make_config(workspace, {"data.dataset_param.text_drop_ratio": 0.9}, eval_iters=5)
    validate, encoders, _ = make_validation(config, world)
    metrics = validate(1)
    expected = direct_losses(config, 10)
    assert [metrics[f"validation_loss/sigma_{sigma}"] for sigma in SIGMAS] == pytest.approx(expected, rel=1e-5)
    assert metrics["validation_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert validate(2) == metrics
    assert len(encoders.captions) == 10, "samples are encoded once"
    assert all(encoders.captions)
    assert not (config.options.save / "validation").exists()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@torch.no_grad()
def test_videos_are_sampled_as_by_the_scheduler_of_diffusers(workspace, world, guidance_scale):
    changes = {"model.diffusion.guidance_scale": guidance_scale, "model.diffusion.shift": 3.0}
    config = make_config(workspace, changes, eval_videos=1, eval_iters=1)
    validate, encoders, transformer = make_validation(config, world)
    validate(1)
    key, batch = sample(config, 0)
    _, no_caption = sample(config, 0, text_drop_ratio=1.0)
    features, empty = encoders.encode(batch), encoders.encode(no_caption)
    scheduler = euler_scheduler(3.0)
    scheduler.set_timesteps(sigmas=inference_sigmas(3))
    y = noise_of(config, key)
    for t in scheduler.timesteps:

        def velocity(context: Tensor, t: Tensor = t, y: Tensor = y) -> Tensor:
            return transformer(y, t.expand(1), context, features["condition"], 0.1).sample

        v = velocity(features["text"])
        if guidance_scale > 1:
            without = velocity(empty["text"])
            v = without + guidance_scale * (v - without)
        y = scheduler.step(v, t, y, return_dict=False)[0]
    (latents,) = encoders.decoded
    torch.testing.assert_close(latents, y, rtol=1e-5, atol=1e-5)


def test_sampled_videos_and_film_strips_lie_under_their_step(workspace, world):
    """Three videos from micro batches of two, more than the loss needs."""
    config = make_config(workspace, eval_iters=1, eval_videos=3)
    validate, _, _ = make_validation(config, world)
    validate(20)
    directory = config.options.save / "validation/step_0000020"
    expected = {name for number in range(3) for name in (f"video_{number}.mp4", f"strip_{number}.png")}
    assert {path.name for path in directory.iterdir()} == expected
    caption = sample(config, 2)[1]["caption"][0]
    with av.open(str(directory / "video_2.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
        assert container.metadata["comment"] == caption
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (5, 32, 32, 3)
    with Image.open(directory / "strip_2.png") as strip:
        assert strip.width > 6 * 160
        assert strip.height > 2 * 160


def test_a_model_that_has_broken_down_or_a_disk_that_is_full_does_not_end_the_run(workspace, world, caplog):
    config = make_config(workspace, eval_videos=2)
    validate, _, transformer = make_validation(config, world)
    config.options.save.mkdir()
    (config.options.save / "validation").write_text("a file where the directory should be")
    validate(1)
    assert "step 1: cannot write video 0" in caplog.text
    nn.init.constant_(transformer.proj_out.weight, torch.nan)
    assert np.isnan(validate(2)["validation_loss"])
    assert "step 2: sampling video 1 ended in NaN or infinity" in caplog.text


def test_data_of_its_own_is_validated_on_and_must_fit(workspace, world, caplog):
    caplog.set_level("INFO")
    files = workspace.files({"data.dataloader_param.num_workers": 1})
    own = workspace.directory / "held_out.json"
    own.write_text(files["mm_data"].read_text())
    there = make_config(workspace, eval_data=own)
    same = make_validation(there, world)[0](1)
    assert "--eval-data is not set" not in caplog.text
    assert make_validation(make_config(workspace), world)[0](1) == same
    assert "--eval-data is not set: validation looks at the training's data" in caplog.text
    own.write_text(own.read_text().replace('"sample_num_frames": 5', '"sample_num_frames": 9'))
    with pytest.raises(InputError, match=r"held_out.json: sample_num_frames is 9, in .*data.json it is 5"):
        make_config(workspace, eval_data=own)


def test_features_encoded_ahead_give_the_same_loss_and_the_real_video_as_the_vae_keeps_it(workspace, world, tmp_path):
    config = make_config(workspace, eval_videos=1)
    validate, encoders, transformer = make_validation(config, world)
    expected = validate(1)
    param = config.data.dataset_param
    dataset = FlashI2VDataset(open_store(param.metafile_or_dir_path), param, seed=config.options.seed)
    with FeatureWriter(tmp_path / "features", {}) as writer:
        for number in range(4):
            batch = sample(config, number)[1]
            whole, features = dataset[number], encoders.encode(batch)
            frames = range(whole["first_frame"], whole["first_frame"] + 5)
            tensors = {"latents": features["latents"][0], "condition": features["condition"][0]}
            writer.put({video_key(whole["path"], frames): tensors})
    ahead = param.model_copy(update={"load_video_features": True, "features_path": str(tmp_path / "features")})

    def read(batch: LoadedBatch) -> Batch:
        texts = [
            encode_text(encoders.text_encoder, ids[None], mask[None])
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])
        ]
        return {**batch["video_features"], "text": torch.cat(texts)}

    config = replace(config, data=config.data.model_copy(update={"dataset_param": ahead}))
    engine = DirectEngine(Stage(transformer, config.latent_shape), config.recipe)
    encoders.decoded.clear()
    found = Validation(config, world, engine.velocity, read, encoders.decode)(1)
    of_real_pictures = ("first_frame_psnr", "real_motion", "real_stillness")  # which are now those that the VAE keeps
    assert found == pytest.approx(expected | {name: found[name] for name in of_real_pictures}, rel=1e-6)
    _, truth = encoders.decoded
    torch.testing.assert_close(truth, encoders.encode(sample(config, 0)[1])["latents"])


# ---- several processes ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "data": {},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "tensor": {"tensor_model_parallel_size": 2},
}


def validate_in_process(rank: int, configs: dict[str, RunConfig], ports: list[int], results: Path) -> None:
    torch.set_num_threads(1)
    losses = {}
    for (name, config), port in zip(configs.items(), ports):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        with join_world("cpu", config.parallel_dims(2)) as world:
            encoders = Encoders(config) if world.embeds else None
            validate = Validation(
                config,
                world,
                make_velocity(config, world),
                encoders and encoders.encode,
                encoders and encoders.decode,
            )
            losses[name] = validate(1)
            world.barrier()
    torch.save(losses, results / f"{rank}.pt")


def make_velocity(config: RunConfig, world: World) -> Callable:
    part, layout = make_transformer(config), world.dims
    number = world.pipeline_rank
    if layout.num_stages > 1:
        part = keep_layers(part, layout.layers_of(number), embeds=number == 0, projects=number == 1)
    parallelise(part, world)
    stage = Stage(part, config.latent_shape)
    if layout.num_stages == 1:
        return DirectEngine(stage, config.recipe).velocity
    return PipelineEngine([stage], world, config, "1f1b").velocity


def test_every_layout_measures_the_same_loss_and_writes_the_same_videos(workspace, world, tmp_path, free_ports):
    """Three micro batches and three videos, which two data parallel places cannot share evenly."""
    make = functools.partial(make_config, workspace, eval_iters=3, eval_videos=3)
    single = make()
    expected = make_validation(single, world)[0](1)
    configs = {name: make(save=tmp_path / name, global_batch_size=4, **options) for name, options in LAYOUTS.items()}
    ports = free_ports(len(configs))
    forked.call("flashi2v-train", 2, validate_in_process, configs, ports, tmp_path)
    for rank in range(2):
        for name, losses in torch.load(tmp_path / f"{rank}.pt").items():
            assert losses == pytest.approx(expected, rel=1e-5), (name, rank)
    whole = single.options.save / "validation/step_0000001"
    for name in LAYOUTS:
        directory = tmp_path / name / "validation/step_0000001"
        assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in whole.iterdir())
        for path in whole.glob("*.png"):
            with Image.open(path) as ours, Image.open(directory / path.name) as theirs:
                difference = np.asarray(ours).astype(int) - np.asarray(theirs)
            assert np.abs(difference).max() <= 2, (name, path.name)
