"""Clips of several shapes: how long ranks wait for each other, and clips per second against one fixed size.

Waits are worked out for eight ranks over mixture.json, 20,000 clips as (frames, height, width, number). The set is made
up: films, telephones, squares and pictures, with lengths that scatter as those of cut films do. Clips per second are
those of a small model on this machine, from features, over a small mixed set; of one fixed size, what is too short for
it is left out, and what has another shape is cropped to it. Both take turns: A B B A.
"""

import argparse
import json
import tempfile
from pathlib import Path

from bench_training import PREDICTOR, settings

from flashi2v_data.loading.buckets import BucketTable, Shape, propose_buckets
from flashi2v_data.loading.composer import Composer
from flashi2v_data.loading.config import Bucket, DataConfig
from flashi2v_data.shapes.scenes import write_shapes
from flashi2v_data.store.reader import write_store
from flashi2v_model import presets
from flashi2v_train import encode
from flashi2v_train.buckets import compose, exponent, waits
from flashi2v_train.config import RunConfig, TrainModelConfig, read_run_config
from flashi2v_train.options import TrainOptions
from flashi2v_train.trainer import train

RANKS, STEPS, FIXED = 8, 24, (17, 96, 160)
RELEASES = {"1.3B": {}, "14B": {"hidden_size": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824}}
# Frames, height, width of the small set's videos; of some only the first frame is taken.
VIDEOS = {(17, 96, 160): 8, (17, 160, 96): 6, (9, 96, 160): 6, (17, 128, 128): 4}
NUM_IMAGES = 8


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def measure_waits(root: Path) -> None:
    """Print the share of a step that a rank waits, over an epoch of the mixture."""
    mixture = json.loads(Path(__file__).with_name("mixture.json").read_text())
    shapes = [Shape(*shape) for *shape, number in mixture for _ in range(number)]
    table = BucketTable(shapes, propose_buckets(shapes, Bucket(49, 480, 832)), "the mixture")
    print(
        f"{len(shapes)} clips, {len(set(shapes))} shapes, {len(table.buckets)} buckets; {table.num_left_out} too short"
    )
    for name, predictor in RELEASES.items():
        model, data = settings(root, root, {"dtype": "bf16", **predictor}, (49, 480, 832))
        options = TrainOptions(mm_model=root, mm_data=root)
        data["dataset_param"]["buckets"] = [[*bucket] for bucket in table.buckets]
        config = RunConfig(options, TrainModelConfig(**model), DataConfig(**data))
        at_random = Composer(table.number_of, [1] * len(table.buckets), [1.0] * len(table.buckets), RANKS, seed=0)
        at_random.costs = tuple(cost.operations for cost in config.costs)
        found = {f"{RANKS} micro batches of one clip, at random": at_random}
        for number in (RANKS, 4 * RANKS):
            found[f"{number} micro batches, composed"] = compose(config, table, range(len(shapes)), number)
        print(f"{name}: a clip costs about its tokens to the power of {exponent(config.costs):.3f}")
        for words, composer in found.items():
            shares = waits(composer, RANKS, composer.packs_per_epoch // composer.num_packs)
            late = sum(share > 0.1 for share in shares)
            print(
                f"  {words}: {sum(shares) / len(shares):.1%} of a step on average, at most {max(shares):.1%}; "
                f"more than a tenth in {late} of {len(shares)} steps"
            )


def measure_clips(root: Path) -> None:
    """Print clips per second with buckets and with one fixed size."""
    records = []
    for number, ((frames, height, width), count) in enumerate(VIDEOS.items()):
        write_shapes(root / str(number), count, number, height, width, frames)
        for path in sorted((root / str(number)).rglob("*.mp4")):
            size = {"height": height, "width": width}
            record = {"path": str(path), "cap": "a circle moves", "fps": 16.0, "start_frame_idx": 0, "resolution": size}
            records.append({**record, "num_frames": frames})
    images = [record | {"num_frames": 1} for record in records[:NUM_IMAGES]]
    presets.init("tiny", root / "model")
    long = [record for record in records if record["num_frames"] == FIXED[0]]
    sets = {"buckets": ([*records, *images], {"buckets": "auto"}), "fixed": (long, {})}
    files = {}
    for name, (clips, data) in sets.items():
        store = write_store(root / f"{name}.lmdb", clips, {"train_fps": 16})
        for loads in (False, True):
            flags = {"load_video_features": loads, "load_text_features": loads}
            place = {"features_path": str(root / f"{name}-features")} if loads else {}
            model, content = settings(root, store, {"dtype": "fp32", **PREDICTOR}, FIXED, **data, **flags, **place)
            files[name] = {
                "mm_model": write(root / f"{name}-model.json", json.dumps(model | flags)),
                "mm_data": write(root / f"{name}-data.json", json.dumps(content)),
            }
            if not loads:
                options = encode.EncodeOptions(**files[name], output=root / f"{name}-features", device="cpu")
                encode.launch(options=options)
    rates: dict[str, list[float]] = {name: [] for name in sets}
    for turn, name in enumerate(("fixed", "buckets", "buckets", "fixed")):
        options = TrainOptions(
            **files[name],
            device="cpu",
            train_iters=STEPS,
            micro_batch_size=2,
            global_batch_size=4,
            save_interval=STEPS,
            save=root / f"run-{turn}",
            use_ema=False,
        )
        config = read_run_config(options)
        train(config)
        lines = [json.loads(line) for line in (options.save / "metrics.jsonl").read_text().splitlines()[2:]]
        seconds = sum(line["seconds"] for line in lines)
        rates[name].append(sum(line["samples_per_second"] * line["seconds"] for line in lines) / seconds)
    for name, (clips, _) in sets.items():
        print(f"{name}: {len(clips)} of {len(records) + len(images)} clips; clips per second {rates[name]}")
    mean = {name: sum(found) / len(found) for name, found in rates.items()}
    print(f"clips per second with buckets: {mean['buckets'] / mean['fixed']:.2f}x of one fixed size")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure_waits(Path(directory))
        measure_clips(Path(directory))


if __name__ == "__main__":
    main()
