"""The real commands with `--device npu`, each a process; numbers are held to those of `--device cpu`.

On NPUs (`nox -s npu`), or where the CPU stands for them (`nox -s conformance`, that is
`python -m flashi2v_npu_ops.testing --devices 2 python -m pytest tests/ascend`).
"""

import json
import os
from pathlib import Path

import av
import forked
import numpy as np
import pytest
from PIL import Image

from flashi2v_npu_ops import UnsupportedError
from flashi2v_npu_ops.device import resolve_device

EMULATED = "STUB_CANN_DEVICES" in os.environ
TABLE = "ASCEND_TABLE"  # a file for the table of operators that is in docs/ascend.md
# What leaves a record, in the table's words.
WORDS = {
    "sampling": "sampling",
    "npu": "training",
    "encoding": "encoding",
    "sharded": "FSDP2",
    "bf16": "FSDP2 in bf16",
    "pipeline": "pipeline",
    "tensor": "tensor parallel",
    "context": "context parallel",
}
STEPS = 2 if EMULATED else 20
CLOSE = 1e-5 if EMULATED else 1e-2  # what losses may differ by from the CPU's, as a share


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Return a directory by name, in which a command's processes leave the operators that they asked NPUs for."""
    root = tmp_path_factory.mktemp("operators")

    def directory(name):
        (root / name).mkdir(exist_ok=True)
        return os.environ | {"STUB_CANN_RECORD": str(root / name)}

    directory.root = root
    yield directory
    if TABLE in os.environ:
        write_table(root, Path(os.environ[TABLE]))


def operators(record, name):
    return read_operators(record.root / name)


def read_operators(directory):
    found = {}
    for path in directory.iterdir():
        for operator, dtypes in json.loads(path.read_text()).items():
            found.setdefault(operator, set()).update(dtypes)
    return found


def write_table(root, path):
    """Write which operators the commands asked NPUs for, as the table of the documentation."""
    rows = {}
    for directory in sorted(root.iterdir()):
        if directory.name in WORDS:
            for operator, dtypes in read_operators(directory).items():
                seen, known = rows.setdefault(operator, ([], set()))
                seen.append(WORDS[directory.name])
                known |= dtypes
    lines = ["| operator | asked for by | dtypes of its tensors |", "|---|---|---|"]
    for operator, (seen, dtypes) in sorted(rows.items()):
        words = "all" if len(seen) == len(WORDS) else ", ".join(seen)
        lines.append(f"| `{operator}` | {words} | {', '.join(sorted(dtypes))} |")
    path.write_text("\n".join(lines) + "\n")


def frames(path):
    with av.open(path) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(np.int16)


@pytest.mark.slow  # of CI's three minutes
def test_a_sampled_video_is_the_cpus(tmp_path, record):
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "first.png")
    videos = {}
    for device, options in {"cpu": [], "npu": [], "npu in groups": ["--offload", "group"]}.items():
        out = tmp_path / f"{device}.mp4"
        words = ["--model", "demo", "--image", tmp_path / "first.png", "--prompt", "a red circle moves right"]
        words += ["-o", out, "--seed", 1, "--dtype", "fp32", "--device", device.split()[0], *options]
        forked.run("flashi2v-infer", *words, check=True, env=record("sampling"))
        videos[device] = frames(out)
    for name in ("npu", "npu in groups"):
        difference = np.abs(videos[name] - videos["cpu"])  # the last bits of the pictures, as a lossy file has them
        assert difference.mean() < (0.5 if EMULATED else 3), name
    used = operators(record, "sampling")
    assert not EMULATED or {"npu.npu_fusion_attention", "npu.npu_rms_norm", "npu.npu_rotary_mul"} <= used.keys()


def losses(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def train(workspace, name, record, changes=None, **options):
    save = workspace.directory / name
    plan = {
        "train_iters": STEPS,
        "global_batch_size": 2,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "save_interval": STEPS,
        **options,
    }
    forked.run("flashi2v-train", *workspace.arguments(changes, save=save, **plan), check=True, env=record(name))
    return losses(save)


@pytest.fixture(scope="module")
def on_cpu(make_workspace, record):
    """Return the run that all others are held to: one process of the CPU."""
    workspace = make_workspace("cpu")
    train(workspace, "cpu", record, train_iters=STEPS + 1, eval_interval=STEPS)
    return workspace.directory / "cpu"


def test_training_is_the_cpus_with_validation_a_resume_and_attention_kept_on_the_host(make_workspace, record, on_cpu):
    workspace = make_workspace("one")
    changes = {"model.predictor.attention_async_offload": True}
    train(workspace, "npu", record, changes, device="npu", eval_interval=STEPS)
    resumed = train(
        workspace, "npu", record, changes, device="npu", train_iters=STEPS + 1, recompute_granularity="selective"
    )
    assert resumed == pytest.approx(losses(on_cpu), rel=CLOSE)
    runs = (on_cpu, workspace.directory / "npu")
    judged = [(run / "validation.jsonl").read_text().splitlines()[0] for run in runs]
    ours, theirs = (json.loads(line)["validation_loss"] for line in judged)
    assert theirs == pytest.approx(ours, rel=CLOSE)
    used = operators(record, "npu")
    assert not EMULATED or {"npu.npu_fusion_attention_grad", "aten._fused_adamw_"} <= used.keys()


LAYOUTS = {
    "sharded": {},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}
SLOW = ("tensor", "context")  # not in every run of CI


@pytest.fixture
def two_npus():
    try:
        resolve_device("npu:1")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("two_npus")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_two_processes_train_as_the_cpu_does(name, make_workspace, record, on_cpu):
    workspace = make_workspace(name)
    changes = {"model.predictor.pipeline_num_layers": [1, 1]} if name == "pipeline" else {}
    two = {"device": "npu", "nproc_per_node": 2, **LAYOUTS[name]}
    found = train(workspace, name, record, changes, **two)
    assert found == pytest.approx(losses(on_cpu)[:STEPS], rel=CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("two_npus")
def test_sharded_training_in_bf16_resumes(make_workspace, record):
    workspace = make_workspace("bf16")
    options = {"device": "npu", "nproc_per_node": 2, "bf16": True}
    first = train(workspace, "bf16", record, **options)
    assert train(workspace, "bf16", record, train_iters=STEPS + 1, **options)[:STEPS] == first


@pytest.mark.slow
def test_features_are_encoded(make_workspace, record):
    workspace = make_workspace("features")
    sizes = {}
    for device in ("cpu", "npu"):
        out = workspace.directory / device
        files = [part for key, path in workspace.files().items() for part in (f"--{key.replace('_', '-')}", path)]
        words = [*files, "--output", out, "--device", device]
        forked.run("flashi2v-encode", *words, check=True, env=record("encoding"))
        sizes[device] = sorted(path.name for path in out.iterdir())
    assert sizes["cpu"] == sizes["npu"]
    assert not EMULATED or "aten.convolution" in operators(record, "encoding")
