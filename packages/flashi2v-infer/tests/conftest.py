"""A tiny pipeline on disk, a photograph and files as users have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world
from PIL import Image
from torch import nn

NUM_FRAMES, HEIGHT, WIDTH = 5, 32, 48


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At these sizes several threads only wait for each other, on a busy machine for seconds."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A whole pipeline of the real classes, with random weights."""
    from flashi2v_model import FlashI2VTransformer3DModel

    directory = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(world.made() / "model", directory)
    torch.manual_seed(0)
    # The last layers start at zero, and then nothing in the network would matter.
    transformer = FlashI2VTransformer3DModel.from_pretrained(directory / "transformer")
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    transformer.save_pretrained(directory / "transformer")
    # Apart from the config.json, which no setting of a file may contradict.
    shutil.copy(directory / "transformer" / "diffusion_pytorch_model.safetensors", directory / "weights.safetensors")
    return directory


@pytest.fixture(scope="session")
def shared_pipe(model_directory: Path):
    from flashi2v_infer import FlashI2VPipeline

    pipe = FlashI2VPipeline.from_pretrained(model_directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe):
    """The pipeline; a test may give it another scheduler."""
    scheduler = shared_pipe.scheduler
    yield shared_pipe
    shared_pipe.scheduler = scheduler


@pytest.fixture(scope="session")
def sampled(shared_pipe):
    """Call the pipeline at a tiny size."""

    def sample(**changes: Any) -> Any:
        settings = {
            "prompt": "a red circle",
            "num_frames": NUM_FRAMES,
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            "max_sequence_length": 24,
        }
        return shared_pipe(**{**settings, **changes}).frames

    return sample


@pytest.fixture(scope="session")
def make_adapter():
    """Make an adapter for a transformer, under the names of `flashi2v_model.weights.adapters`."""

    def make(transformer, rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
        """An adapter of the blocks' matrices, weighed by alpha, with a difference of each cross attention's norm."""
        random = torch.Generator().manual_seed(seed)
        adapter = {}
        for path, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and path.startswith("blocks."):
                adapter[f"{path}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=random) / 5
                adapter[f"{path}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=random) / 5
                adapter[f"{path}.alpha"] = torch.tensor(rank / 2)
            elif path.endswith("norm2"):
                adapter[f"{path}.lora_diff.weight"] = torch.randn(module.weight.shape, generator=random) / 5
        return adapter

    return make


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """A picture of odd size with what photographs have: light falling off, texture, edges, grain. (133, 217, 3)."""
    y, x = np.mgrid[0:133, 0:217]
    light = 200 - 0.8 * x + 0.3 * y
    texture = 20 * np.sin(x / 3) * np.cos(y / 4)
    red = light + texture
    red[40:90, 60:120] = 30  # a dark object left of the middle
    picture = np.stack([red, 0.7 * light, 255 - light], -1)
    picture += np.random.default_rng(0).normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def poisoned(model_directory: Path, tmp_path_factory) -> Path:
    """A text encoder for which every "z" is NaN, so that one video of a batch fails and others do not."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("poisoned") / "text_encoder"
    shutil.copytree(model_directory / "text_encoder", directory)
    weights = load_file(directory / "model.safetensors")
    weights["shared.weight"][AutoTokenizer.from_pretrained(model_directory / "tokenizer")("z").input_ids[0]] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def job(tmp_path, monkeypatch, model_directory, photograph):
    """A working directory with images, prompts and inference_model.json; call it to change the file's settings."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph).save("first.png")
    # As cameras held upright write it: the pixels lie on their side and the EXIF orientation says so.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(photograph).copy()).save("second.jpg", quality=95, exif=exif)
    Path("prompts.txt").write_text("a red circle moves left\na dark object, it stands still\n\n")
    Path("images.txt").write_text("first.png\nsecond.jpg\n")

    def write(**changes: Any) -> Path:
        """Write the file with some settings changed; a dict changes single keys of a part."""
        settings = json_settings(model_directory)
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
        # As the reference's files are written: with comments.
        text = json.dumps(settings, indent=4).replace(",\n", ", # as you like\n")
        path = tmp_path / "inference_model.json"
        path.write_text(text)
        return path

    return write


def json_settings(model: Path) -> dict[str, Any]:
    return {
        "pipeline_class": "FlashI2VPipeline",
        "prompt": "prompts.txt",
        "image": "images.txt",
        "save_path": "samples",
        "use_prompt_preprocess": False,
        "dtype": "fp32",
        "device": "cpu",
        "frame_interval": 1,
        "fps": 8,
        "pipeline_config": {"input_size": [NUM_FRAMES, HEIGHT, WIDTH]},
        "data_transform": {
            "video": [
                {
                    "trans_type": "CenterCropResizeVideo",
                    "param": {"transform_size": [HEIGHT, WIDTH], "align_corners": False, "antialias": True},
                },
                {"trans_type": "ToTensorVideo"},
                {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
            ]
        },
        "ae": {"model_id": "wan_video_vae", "from_pretrained": str(model / "vae"), "do_sample": False},
        "tokenizer": {"autotokenizer_name": "AutoTokenizer", "from_pretrained": str(model / "tokenizer")},
        "text_encoder": {"model_id": "UMT5", "from_pretrained": str(model / "text_encoder")},
        "predictor": {
            "model_id": "flashi2vdit",
            "from_pretrained": str(model / "weights.safetensors"),
            "text_len": 512,
            "hidden_size": 128,
            "num_heads": 4,
            "num_layers": 4,
            "ffn_dim": 512,
            "freq_dim": 64,
            "text_dim": 64,
            "low_freq_energy_ratio": 0.1,
        },
        "diffusion": {"model_id": "flow_matching", "num_inference_steps": 2, "shift": 7.0, "guidance_scale": 5.0},
        "seed": 3,
    }
