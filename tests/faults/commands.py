"""The commands that are struck: their small inputs, how each is called, and what is compared of what it leaves."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

SIZE, FRAMES, VIDEOS = 32, 5, 20
EXAMPLES = Path(__file__).parents[2] / "examples" / "demo_model"
OUT = "out"  # where every command writes, in the working directory


@dataclass(frozen=True)
class Command:
    """One way to call a command.

    Attributes:
        name: in tables.
        main: "module:function" of the console script.
        arguments: of the command line, the same for every start.
        num_processes: processes that torchrun would start.
        ended: a part of what the command says when all had been done before; it then exits with 2.
    """

    name: str
    main: str
    arguments: tuple[str, ...]
    num_processes: int = 1
    ended: str = ""


def run(command: Command) -> int:
    """Run a command in this process, as its console script does; return its exit code."""
    module, _, function = command.main.partition(":")
    sys.argv = [module, *command.arguments]
    try:
        getattr(import_module(module), function)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def import_all() -> None:
    """Import what the commands do, so that forks start at once."""
    for name in (
        "flashi2v_data.curation.filter",
        "flashi2v_train.trainer",
        "flashi2v_train.encoding",
        "flashi2v_infer.commands.run",
    ):
        import_module(name)


def warm_up(inputs: Path) -> None:
    """Let libraries fill their caches: transformers compiles a thousand regular expressions before its first model."""
    from transformers import UMT5EncoderModel

    from flashi2v_model.weights.libraries import quieten

    quieten()
    UMT5EncoderModel.from_pretrained(inputs / "model/text_encoder")


def prepare(inputs: Path) -> list[Command]:
    """Write videos, a model, a store and configuration files into a new directory; return the commands on them."""
    import torch

    from flashi2v_data.shapes.scenes import write_shapes
    from flashi2v_model import presets

    write_shapes(inputs / "shapes", VIDEOS, 0, SIZE, SIZE, FRAMES)
    torch.manual_seed(0)
    presets.init("tiny", inputs / "model")
    return [_filter(inputs), *_train(inputs), _infer(inputs)]


def _filter(inputs: Path) -> Command:
    """Clips enough for more than one piece and more than one transaction, some of them bare, which are probed."""
    known = json.loads((inputs / "shapes/videos.json").read_text())
    entries = [entry | {"cap": f"{entry['cap']}, {number}"} for number in range(150) for entry in known]
    entries += [{"path": entry["path"], "cap": "bare"} for entry in known[:3]]
    (inputs / "videos.json").write_text(json.dumps(entries))
    (inputs / "videos.txt").write_text(f"{inputs / 'shapes'},{inputs / 'videos.json'}\n")
    path = _settings(inputs, "filter_config.yaml", {**_SAMPLE, "min_hxw": SIZE * SIZE}, ann_txt_path="videos.txt")
    arguments = ("filter", "--filter_config", str(path), "--jobs", "1", "--resume")
    return Command("filter", "flashi2v_data.cli:main", arguments, ended="already")


_SAMPLE = {"sample_height": SIZE, "sample_width": SIZE, "sample_num_frames": FRAMES}


def _settings(inputs: Path, example: str, changes: dict[str, Any], name: str = "", **places: str) -> Path:
    """Write one of the example's files with changes; keys are dotted, places (with `__` for dots) below the inputs."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    settings = yaml.load((EXAMPLES / example).read_text())
    for key, value in {
        "save_path": OUT,
        **changes,
        **{key: str(inputs / place) for key, place in places.items()},
    }.items():
        *parents, last = key.split("__") if key in places else key.split(".")
        part = settings
        for parent in parents:
            part = part[parent]
        if key != "save_path" or last in part:
            part[last] = value
    path = inputs / (name or Path(example).with_suffix(".json").name)
    path.write_text(json.dumps(settings, indent=1))
    return path


def _train(inputs: Path) -> Iterator[Command]:
    """Encoding, and training in one process and two: from videos, with every step saved."""
    from flashi2v_data.curation.config import FilterConfig
    from flashi2v_data.curation.stream import filter_records
    from flashi2v_data.settings import load_config
    from flashi2v_data.store.reader import write_store

    known = json.loads((inputs / "shapes/videos.json").read_text())
    entries = [entry | {"path": str(inputs / "shapes" / entry["path"])} for entry in known]
    limits = load_config(inputs / "filter_config.json", FilterConfig)
    write_store(inputs / "store/clips.lmdb", filter_records(entries, limits), limits.model_dump())
    transform = {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [SIZE, SIZE]}}
    features = {"load_video_features": False, "load_text_features": False}
    data = {f"dataset_param.{key}": value for key, value in {**_SAMPLE, **features, "tokenizer_max_length": 16}.items()}
    data |= {"dataset_param.features_path": None, "dataloader_param.num_workers": 0}
    data |= {"dataset_param.transform_pipeline.video": [transform, {"trans_type": "ToTensorVideo"}, _NORM]}
    places = {"metafile_or_dir_path": "store", "text_tokenizer_path": "model/tokenizer"}
    places = {f"dataset_param__{key}": place for key, place in places.items()}
    data_path = _settings(inputs, "data.json", data, **places)
    sizes = {"hidden_size": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "freq_dim": 32, "text_len": 16}
    model_path = _settings(
        *(inputs, "pretrain_model.json", features | {f"predictor.{key}": value for key, value in sizes.items()}),
        ae__from_pretrained="model/vae",
        text_encoder__from_pretrained="model/text_encoder",
    )
    model_settings = {**features, **{f"predictor.{key}": value for key, value in sizes.items()}}
    encoders = {"ae__from_pretrained": "model/vae", "text_encoder__from_pretrained": "model/text_encoder"}
    model_path = _settings(inputs, "pretrain_model.json", model_settings, **encoders)
    files = ("--mm-model", str(model_path), "--mm-data", str(data_path), "--device", "cpu")
    yield Command("encode", "flashi2v_train.encode:main", (*files, "--output", OUT))
    steps = ("--save", OUT, "--train-iters", "3", "--save-interval", "1", "--keep-checkpoints", "2")
    steps += ("--micro-batch-size", "1", "--lr", "1e-3", "--ema-decay", "0.9")
    yield Command("train", "flashi2v_train.launcher:main", (*files, *steps))
    run(Command("", "flashi2v_train.encode:main", (*files, "--output", str(inputs / "features"))))
    # Two processes read the features that were just made: without encoders they start sooner.
    places["dataset_param__features_path"] = "features"
    loaded = {"load_video_features": True, "load_text_features": True}
    data |= {f"dataset_param.{key}": value for key, value in loaded.items()}
    data_path = _settings(inputs, "data.json", data, name="data_of_features.json", **places)
    model_path = _settings(
        *(inputs, "pretrain_model.json", model_settings | loaded), name="model_of_features.json", **encoders
    )
    files = ("--mm-model", str(model_path), "--mm-data", str(data_path), "--device", "cpu")
    yield Command("train by two", "flashi2v_train.launcher:main", (*files, *steps), num_processes=2)


_NORM = {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}}


def _infer(inputs: Path) -> Command:
    from PIL import Image

    pictures = [inputs / f"{number}.png" for number in range(2)]
    for number, picture in enumerate(pictures):
        Image.new("RGB", (SIZE, SIZE), (200, 40, 100 * number)).save(picture)
    (inputs / "image.txt").write_text("".join(f"{picture}\n" for picture in pictures))
    (inputs / "prompt.txt").write_text("a red square\na pink square\n")
    transform = {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [SIZE, SIZE]}}
    changes = {"data_transform.video": [transform, {"trans_type": "ToTensorVideo"}, _NORM]}
    changes |= {"pipeline_config.input_size": [FRAMES, SIZE, SIZE], "diffusion.num_inference_steps": 2}
    config = json.loads((inputs / "model/transformer/config.json").read_text())
    heads = config["num_attention_heads"]
    sizes = {"hidden_size": heads * config["attention_head_dim"], "num_heads": heads, "text_len": 16}
    sizes |= {key: config[key] for key in ("ffn_dim", "freq_dim", "text_dim", "num_layers", "patch_size")}
    changes |= {f"predictor.{key}": value for key, value in sizes.items()}
    weights = inputs / "weights.safetensors"  # apart from its config.json, which no setting may contradict
    (inputs / "model/transformer/diffusion_pytorch_model.safetensors").rename(weights)
    path = _settings(
        *(inputs, "inference_model.json", changes),
        prompt="prompt.txt",
        image="image.txt",
        ae__from_pretrained="model/vae",
        tokenizer__from_pretrained="model/tokenizer",
        text_encoder__from_pretrained="model/text_encoder",
        predictor__from_pretrained=weights.name,
    )
    arguments = ("--mm-model", str(path), "--resume", "--strip", f"{OUT}/strips")
    return Command("infer", "flashi2v_infer.cli:main", arguments)


# What is compared: every name, and under it every record, tensor or byte.

# They say how long something took, or when, or are of bytes that hold such; checkpoints are read back, and so verified.
_TIMES = ("seconds", "_per_second", "seconds_stalled_by_checkpoints", "data_wait_share", "peak_memory_bytes")
_TIMED = ("train_summary.json", "lock.mdb", "checksums.json")


def contents(directory: Path) -> dict[str, str]:
    """Return everything below a directory by name, as hashes."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        try:
            found |= _contents_of(path, name)
        except Exception as error:  # whatever a library raises on what is half made
            found[name] = f"cannot be read: {error}"
    return found


def _contents_of(path: Path, name: str) -> dict[str, str]:
    if path.is_dir():
        return {name: "directory"}
    if path.name == "data.mdb":
        return {f"{name}: {key}": value for key, value in _records(path.parent)}
    if path.name == ".metadata":
        return {f"{path.parent.name}: {key}": value for key, value in _tensors(path.parent)}
    if path.name == "metrics.jsonl":
        return {f"{name}: {step}": value for step, value in enumerate(_numbers(path), 1)}
    if path.suffix == ".distcp" or path.name in _TIMED:
        return {name: "a file"}
    if path.name.startswith("events."):  # every start writes one of its own
        return {"events": "files"}
    return {name: _hash(path.read_bytes())}


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _records(store: Path) -> Iterator[tuple[str, str]]:
    import lmdb

    with lmdb.open(str(store), readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key, value in transaction.cursor():
            yield (key.decode() if key.isascii() else key.hex()), _hash(bytes(value))


def _tensors(checkpoint: Path) -> Iterator[tuple[str, str]]:
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(state, storage_reader=reader, no_dist=True)
    for key, tensor in state.items():
        yield key, _hash(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _numbers(metrics: Path) -> Iterator[str]:
    for line in metrics.read_text().splitlines():
        numbers = json.loads(line)
        yield json.dumps({key: value for key, value in numbers.items() if not key.endswith(_TIMES)})


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Name what is missing, left over or changed."""
    words = [f"{name} is missing" for name in expected if name not in found]
    words += [f"{name} is left over" for name in found if name not in expected]
    return words + [f"{name} differs" for name in expected if found.get(name, expected[name]) != expected[name]]


def environment(command: Command, rank: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process of a command."""
    if command.num_processes == 1:
        return {}
    size, number = str(command.num_processes), str(rank)
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return names | {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
