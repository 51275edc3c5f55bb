"""Clips per second of the loader by number of workers, in one run: 720p clips to 49 frames of 480x832, float32."""

import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from scene import write_scene

from flashi2v_data import FlashI2VDataset, StatefulDistributedSampler, StatefulLoader, open_store, write_store
from flashi2v_data.captions.tokenizer import TextTokens
from flashi2v_data.loading.config import DataConfig

FRAMES, HEIGHT, WIDTH, NUM_CLIPS, ROUNDS = 49, 480, 832, 8, 3
WORKERS = (0, 1, 2)


def tokenize(text: str) -> TextTokens:
    """Stand in for a tokenizer, whose time beside a decoder's does not count."""
    ids = torch.zeros(512, dtype=torch.int64)
    return TextTokens(ids, ids)


def config(store: Path, num_workers: int) -> DataConfig:
    resize = {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [HEIGHT, WIDTH]}}
    return DataConfig(
        dataset_param={
            "dataset_type": "flashi2v",
            "metafile_or_dir_path": str(store),
            "text_tokenizer_path": "",
            "sample_height": HEIGHT,
            "sample_width": WIDTH,
            "sample_num_frames": FRAMES,
            "train_fps": 16,
            "text_drop_ratio": 0.1,
            "tokenizer_max_length": 512,
            "return_prompt_mask": True,
            "transform_pipeline": {
                "video": [resize, {"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}],
            },
        },
        dataloader_param={
            "dataloader_mode": "sampler",
            "sampler_type": "StatefulDistributedSampler",
            "collate_param": {"model_name": "flashi2v"},
            "shuffle": True,
            "drop_last": True,
            "pin_memory": False,
            "num_workers": num_workers,
        },
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.mp4"
        write_scene(path, 720, 1280, 97)
        record = {"path": str(path), "cap": "a texture", "resolution": {"height": 720, "width": 1280}}
        record |= {"fps": 24, "num_frames": 97, "start_frame_idx": 0}
        store = open_store(write_store(Path(directory) / "clips.lmdb", [record] * NUM_CLIPS, {}))
        loaders = {}
        for num_workers in WORKERS:
            settings = config(store.paths[0], num_workers)
            dataset = FlashI2VDataset(store, settings.dataset_param, seed=0, tokenizer=tokenize)
            sampler = StatefulDistributedSampler(NUM_CLIPS, seed=0)
            loaders[num_workers] = StatefulLoader(dataset, sampler, 1, settings.dataloader_param)
        rates: dict[int, list[float]] = {num_workers: [] for num_workers in WORKERS}
        for _ in range(ROUNDS):
            for num_workers, loader in loaders.items():
                batches = iter(loader)
                next(batches)  # starts the workers
                begin = time.perf_counter()
                for _batch in islice(batches, 2 * NUM_CLIPS):
                    pass
                rates[num_workers].append(2 * NUM_CLIPS / (time.perf_counter() - begin))
                loader.close()
    base = max(rates[1])
    for num_workers, measured in rates.items():
        print(f"{num_workers} workers  {max(measured):6.2f} clips a second, {max(measured) / base:.2f}x of 1 worker")


if __name__ == "__main__":
    main()
