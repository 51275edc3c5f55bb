"""`flashi2v-infer` and `flashi2v-encode` with `--device npu`, held to `--device cpu`."""

import lmdb
import numpy as np
import pytest
import safetensors.torch
import torch
from npu_runs import EMULATED
from PIL import Image

from flashi2v_data.store.features import feature_stores
from flashi2v_infer import FlashI2VPipeline, demo
from flashi2v_model.scheduler import make_scheduler

PROMPT = "a red circle moves right"
STEPS = 4 if EMULATED else 25
# What pictures of 8 bits may differ by: one level where rounding falls to the other side.
LEVELS = 1 if EMULATED else 8
FUSED = {"npu.npu_rms_norm", "npu.npu_rotary_mul", "npu.npu_gelu"}


@pytest.fixture(scope="module")
def first_frame(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "first.png"
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def sampled(first_frame, runs, tmp_path_factory):
    """Return what samples a video without losses, (frames, rows, columns, 3)."""
    root = tmp_path_factory.mktemp("videos")

    def sample(name, *options, device="npu", processes=1):
        out = root / name
        words = [
            "--model",
            "demo",
            "--image",
            first_frame,
            "--prompt",
            PROMPT,
            "-o",
            f"{out}/",
            "--scale",
            1,
            "--seed",
            1,
        ]
        words += ["--num-inference-steps", STEPS, "--guidance-scale", 2, "--device", device, *options]
        runs(f"sampling: {name}", "flashi2v-infer", *words, processes=processes)
        frames = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
        return np.stack(frames).astype(np.int16)

    return sample


@pytest.fixture(scope="module")
def on_cpu(sampled):
    return sampled("on the CPU", "--dtype", "fp32", device="cpu")


EXACT = {
    "fp32": ["--dtype", "fp32"],
    "both branches at once, weights by part": ["--dtype", "fp32", "--cfg-batch", "--offload", "model"],
    "weights by block": ["--dtype", "fp32", "--offload", "group"],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_sampled_video_is_the_cpus_to_rounding(name, sampled, on_cpu, runs):
    video = sampled(name, *EXACT[name])
    assert video.shape == on_cpu.shape
    assert np.abs(video - on_cpu).max() <= LEVELS
    assert not EMULATED or runs.used(f"sampling: {name}").keys() >= FUSED | {"npu.npu_fusion_attention"}


def test_low_memory_and_bf16_stay_close(sampled, on_cpu, runs):
    """Everything in bf16, the VAE too, and attention by the kernel for inference."""
    video = sampled("low memory", "--low-memory", "--vae-tiling", "--dtype", "bf16")
    assert np.abs(video - on_cpu).mean() < 3
    used = runs.used("sampling: low memory")
    assert not EMULATED or used.keys() >= FUSED | {"npu.npu_fused_infer_attention_score"}


@pytest.mark.usefixtures("two_npus")
def test_two_processes_sample_one_video_together(sampled, on_cpu):
    video = sampled("context parallel", "--dtype", "fp32", "--context-parallel-size", 2, processes=2)
    assert np.abs(video - on_cpu).max() <= LEVELS


def sample_by_every_scheduler(rank):
    """Latents by every scheduler and both ways of guidance, tiles of the VAE: the pipeline as a library."""
    close = {"atol": 1e-4, "rtol": 1e-4} if EMULATED else {"atol": 5e-2, "rtol": 5e-2}
    pipelines = [FlashI2VPipeline.from_pretrained(demo.DIRECTORY).to(device) for device in ("cpu", "npu")]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    given = {"image": image, "num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 3}
    latents = None
    for name in ("euler", "heun", "unipc", "dpm++"):
        made = []
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
            pipeline.scheduler = make_scheduler(name, 5.0)
            batched = name in ("heun", "dpm++")
            options = {"prompt": PROMPT, "guidance_scale": 2.0, "cfg_batch": batched, "output_type": "latent"}
            made.append(pipeline(**given, **options, generator=torch.Generator().manual_seed(0)).frames)
        torch.testing.assert_close(made[1].cpu(), made[0], **close, msg=lambda words, name=name: f"{name}: {words}")
        latents = made[0]
    tiled = []
    for pipeline in pipelines:
        pipeline.vae.enable_tiling(32, 32, 24, 24)
        tiled.append(pipeline.vae.decode(latents.to(pipeline.device)).sample.cpu())
    torch.testing.assert_close(tiled[1], tiled[0], **close)


def test_every_scheduler_both_ways_of_guidance_and_tiles_are_the_cpus(runs):
    runs.call("sampling: schedulers", sample_by_every_scheduler)


def read_features(folder):
    found = {}
    for store in feature_stores(folder):
        with lmdb.open(str(store), readonly=True, lock=False) as environment, environment.begin() as transaction:
            for key, value in transaction.cursor():
                if key != b"header":
                    parts = safetensors.torch.load(value[:-8])  # behind which stands a checksum
                    found |= {(key, name): tensor for name, tensor in parts.items()}
    return found


def test_features_are_the_cpus(make_workspace, runs):
    workspace = make_workspace("features")
    files = [part for key, path in workspace.files().items() for part in (f"--{key.replace('_', '-')}", path)]
    stores = []
    for device in ("cpu", "npu"):
        out = workspace.directory / device
        runs(f"encoding: {device}", "flashi2v-encode", *files, "--output", out, "--device", device)
        stores.append(out)
    ours, theirs = (read_features(path) for path in stores)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    close = {"atol": 2e-5, "rtol": 1e-4} if EMULATED else {"atol": 5e-2, "rtol": 5e-2}
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key].float(), tensor.float(), **close)
