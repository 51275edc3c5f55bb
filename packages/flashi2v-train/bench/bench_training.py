"""What training costs beside the model: steps from features against the bare forward and backward, and saving.

Everything is made here: videos of moving shapes, a small VAE and text encoder, their features. Bare and whole steps
take turns in one process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flashi2v_model import presets
from flashi2v_train.batch import Batch, pick
from flashi2v_train.config import read_run_config
from flashi2v_train.options import TrainOptions
from flashi2v_train.processes import StopSignal
from flashi2v_train.trainer import Trainer
from flashi2v_train.world import join_world

SIZE, FRAMES, CLIPS, BATCH, STEPS = 128, 33, 12, 2, 12
PREDICTOR = {"hidden_size": 256, "num_heads": 4, "num_layers": 8, "ffn_dim": 1024, "text_dim": 64, "text_len": 64}


class Measured(Trainer):
    """Before each step times the bare forward and backward of the same model on inputs of the same shape."""

    batch: Batch | None = None

    def train_step(self, *arguments):
        if self.batch is None:
            self.batch = self.next_batch()[0].batches[0]
            self.bare, self.whole = [], []
            self._bare()  # warm
        self.bare.append(self._bare())
        started = time.perf_counter()
        result = super().train_step(*arguments)
        self.whole.append(time.perf_counter() - started)
        return result

    def _bare(self) -> float:
        assert self.batch is not None
        inputs, wanted = self.recipe.inputs(self.batch), self.recipe.target(self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        velocity = self.stages[0](*pick(inputs, self.stages[0].names))
        self.recipe.loss(velocity, wanted).mean().backward()
        return time.perf_counter() - started


def settings(root: Path, store: Path, predictor: dict[str, Any], shape: tuple[int, int, int], **data: Any) -> Any:
    """Return what the two files hold."""
    frames, height, width = shape
    length = predictor.get("text_len", 512)
    model = {
        "ae": {"model_id": "wan_video_vae", "from_pretrained": str(root / "model/vae")},
        "text_encoder": {"model_id": "UMT5", "from_pretrained": str(root / "model/text_encoder"), "dtype": "fp32"},
        "diffusion": {"model_id": "flow_matching", "use_logitnorm_time_sampling": True},
        "predictor": {"model_id": "flashi2vdit", **predictor},
    }
    transforms = [
        {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [height, width]}},
        {"trans_type": "ToTensorVideo"},
        {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
    ]
    dataset = {
        "dataset_type": "flashi2v",
        "metafile_or_dir_path": str(store),
        "text_tokenizer_path": str(root / "model/tokenizer"),
        "sample_height": height,
        "sample_width": width,
        "sample_num_frames": frames,
        "train_fps": 16,
        "text_drop_ratio": 0.1,
        "tokenizer_max_length": length,
        "return_prompt_mask": True,
        "transform_pipeline": {"video": transforms},
        **data,
    }
    loader = {
        "dataloader_mode": "sampler",
        "sampler_type": "StatefulDistributedSampler",
        "collate_param": {"model_name": "flashi2v"},
        "shuffle": True,
        "drop_last": True,
        "pin_memory": False,
        "num_workers": 0,
    }
    return model, {"dataset_param": dataset, "dataloader_param": loader}


def prepare(root: Path) -> dict[str, Path]:
    """Make videos, store, encoders, features and the two files; return the files as options."""

    def run(*words: object) -> None:
        command, *rest = map(str, words)
        program = Path(sys.executable).with_name(command)
        subprocess.run([program, *rest], check=True, capture_output=True)

    run("flashi2v-data", "shapes", root / "shapes", "--num", CLIPS, "--size", f"{SIZE}x{SIZE}", "--frames", FRAMES)
    limits = {
        "ann_txt_path": str(root / "shapes/videos.txt"),
        "save_path": str(root / "store"),
        "sample_height": SIZE,
        "sample_width": SIZE,
        "sample_num_frames": FRAMES,
        "min_hxw": SIZE * SIZE,
        "train_fps": 16,
        "max_h_div_w_ratio": 1.2,
        "min_h_div_w_ratio": 0.4,
    }
    (root / "filter.yaml").write_text(json.dumps(limits))
    run("flashi2v-data", "filter", "--filter_config", root / "filter.yaml")
    presets.init("tiny", root / "model")
    files = {"mm_model": root / "model.json", "mm_data": root / "data.json"}
    for loads in (False, True):
        flags = {"load_video_features": loads, "load_text_features": loads}
        place = {"features_path": str(root / "features")} if loads else {}
        predictor = {"dtype": "fp32", **PREDICTOR}
        model, data = settings(root, root / "store", predictor, (FRAMES, SIZE, SIZE), **flags, **place)
        files["mm_model"].write_text(json.dumps({**model, **flags}))
        files["mm_data"].write_text(json.dumps(data))
        if not loads:
            pair = ("--mm-model", files["mm_model"], "--mm-data", files["mm_data"])
            run("flashi2v-encode", *pair, "--output", root / "features", "--device", "cpu")
    return files


def train(files: dict[str, Path], run: Path, **options: object) -> Measured:
    values = {"device": "cpu", "train_iters": STEPS, "micro_batch_size": BATCH, "save_interval": STEPS, **options}
    config = read_run_config(TrainOptions(**files, save=run, **values))
    with join_world("cpu", config.parallel_dims(1)) as world:
        trainer = Measured(config, world)
        trainer.run(StopSignal())
    return trainer


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        files = prepare(root)
        trainer = train(files, root / "run")
        bare, whole = statistics.median(trainer.bare), statistics.median(trainer.whole)
        lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
        wait = statistics.median(line["data_wait_share"] for line in lines)
        print(
            f"{STEPS} steps of {BATCH} clips, {FRAMES}x{SIZE}x{SIZE}, {torch.get_num_threads()} threads, from features"
        )
        print(
            f"bare forward and backward {1.0:.2f}x ({bare:.2f} s), whole step {whole / bare:.3f}x, data wait {wait:.2%}"
        )
        stalls = {}
        for name, asynchronous in (("blocking", False), ("asynchronous", True)):
            measured = train(files, root / name, save_interval=3, async_save=asynchronous)
            stalls[name] = measured.checkpoints.stalled_seconds / (STEPS // 3)
        size = sum(tensor.nbytes for tensor in trainer.state.values())
        blocking, others = stalls["blocking"], stalls["asynchronous"]
        print(f"a save of {size / 2**20:.0f} MiB holds training up {1.0:.2f}x ({blocking:.2f} s) blocking,", end=" ")
        print(f"{others / blocking:.2f}x asynchronous")


if __name__ == "__main__":
    main()
