"""Whole runs: resumed equals uninterrupted, two processes equal one, what a run leaves on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image

from flashi2v_data import build_dataloader
from flashi2v_data.errors import InputError
from flashi2v_data.settings import load_config
from flashi2v_model import FlashI2VTransformer3DModel, convert_state_dict
from flashi2v_model.weights import read_state_dict
from flashi2v_model.weights.checksums import CHECKSUMS
from flashi2v_train.config import TrainModelConfig, TrainOptions, read_run_config
from flashi2v_train.status import describe
from flashi2v_train.trainer import train
from flashi2v_train.validation import VIDEO_MEASURES


def options(workspace, name="run", changes=None, **values) -> TrainOptions:
    defaults = {"device": "cpu", "train_iters": 6, "micro_batch_size": 2, "lr": 1e-3, "ema_decay": 0.9}
    return TrainOptions(**workspace.files(changes), save=workspace.directory / name, **{**defaults, **values})


def run(workspace, name="run", changes=None, **values) -> Path:
    return train(read_run_config(options(workspace, name, changes, **values)))


def launch(arguments, code=0) -> str:
    done = forked.run("flashi2v-train", *arguments)
    assert done.returncode == code, done.stderr
    return done.stderr


def losses(directory: Path) -> list[float]:
    return column(directory, "loss")


def column(directory: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights(directory: Path, ema: bool = True) -> dict[str, torch.Tensor]:
    return read_state_dict(directory, ema=ema)


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    for ema in (False, True):
        ours, theirs = weights(one, ema), weights(other, ema)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], **(tolerance or {"atol": 0.0, "rtol": 0.0}), msg=key)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(workspace):
    """Over an epoch's end (4 steps), with adaptive clipping, warm-up and decay, EMA and loader workers."""
    plan = {
        "clip_grad_ema_decay": 0.99,
        "lr_warmup_iters": 2,
        "lr_decay_style": "cosine",
        "changes": {"data.dataloader_param.num_workers": 1},
    }
    whole = run(workspace, "whole", **plan)
    halves = run(workspace, "halves", **plan, save_interval=3)
    (halves / "latest_checkpointed_iteration.txt").write_text("3\n")  # as if killed after step 3
    run(workspace, "halves", **plan)
    assert losses(halves) == losses(whole)
    assert len(losses(whole)) == 6
    assert_same_weights(whole, halves)


def test_two_processes_equal_one(workspace):
    """FSDP2 over two processes, with accumulation: the same losses and weights up to rounding."""
    one = run(workspace, "one", train_iters=3, global_batch_size=4, micro_batch_size=4)
    plan = {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 1, "lr": 1e-3, "ema_decay": 0.9}
    launch(workspace.arguments(save=workspace.directory / "two", nproc_per_node=2, **plan))
    two = workspace.directory / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(one, two, atol=2e-5, rtol=1e-3)


def test_remembered_features_change_nothing(workspace):
    """Over two epochs of 8 clips, with the posterior drawn anew each time and half of the clips mirrored."""
    pipeline = workspace.data["dataset_param"]["transform_pipeline"]["video"]
    changes = {"data.dataset_param.transform_pipeline.video": [{"trans_type": "RandomHorizontalFlipVideo"}, *pipeline]}
    plain = run(workspace, "plain", changes)
    cached = run(workspace, "cached", changes, feature_cache_gib=1.0)
    assert losses(cached) == losses(plain)
    assert_same_weights(plain, cached)


def test_bf16_training_follows_fp32(workspace):
    exact, rounded = run(workspace, "fp32", train_iters=4), run(workspace, "bf16", train_iters=4, bf16=True)
    assert losses(rounded) == pytest.approx(losses(exact), rel=2e-2)
    assert column(rounded, "grad_norm") == pytest.approx(column(exact, "grad_norm"), rel=5e-2)
    assert losses(rounded) != losses(exact)
    assert {tensor.dtype for tensor in weights(rounded, ema=False).values()} == {torch.float32}


def test_the_loss_falls(workspace):
    values = losses(run(workspace, train_iters=100, micro_batch_size=4, lr=5e-3))
    assert sum(values[-10:]) < 0.85 * sum(values[:10])


def test_a_run_leaves_what_it_promises(workspace):
    directory = run(workspace, train_iters=4, save_interval=2, log_interval=2)
    names = {path.name for path in directory.iterdir() if not path.name.startswith("events.")}
    assert names == {
        "metrics.jsonl",
        "config.json",
        "iter_0000002",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
        "train_loss.png",
        "train_summary.json",
    }
    assert len(list(directory.glob("events.*"))) == 1
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"loss", "grad_norm", "lr", "seconds", "samples_per_second", "tokens_per_second"} <= lines[0].keys()
    assert {"data_wait_share", "peak_memory_bytes", "skipped_videos", "skipped_steps"} <= lines[0].keys()
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    summary = json.loads((directory / "train_summary.json").read_text())
    assert (summary["ended"], summary["steps"], summary["final_loss"]) == ("done", 4, lines[-1]["loss"])
    assert summary["parallel"] == "one process"
    config = json.loads((directory / "config.json").read_text())
    assert config["options"]["train_iters"] == 4
    assert config["model"]["predictor"]["conv3x3x3_proj"] is True


def test_an_unreadable_video_is_skipped_counted_and_named(workspace, inputs, tmp_path, caplog):
    from flashi2v_data.store.reader import open_store, write_store

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(broken)} if i == 3 else store[i] for i in range(len(store))]
    write_store(tmp_path / "broken.lmdb", records, store.config)
    caplog.set_level("WARNING")
    changes = {"data.dataset_param.metafile_or_dir_path": str(tmp_path / "broken.lmdb")}
    directory = run(workspace, changes=changes, train_iters=4)
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_videos"] == 1
    assert str(broken) in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_of_which_nothing_can_be_read_is_one_line(workspace, inputs, tmp_path, monkeypatch, capsys, num_workers):
    from flashi2v_data.store.reader import open_store, write_store
    from flashi2v_train import launcher

    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(tmp_path / f"gone_{i}.mp4")} for i in range(len(store))]
    write_store(tmp_path / "gone.lmdb", records, store.config)
    changes = {
        "data.dataset_param.metafile_or_dir_path": str(tmp_path / "gone.lmdb"),
        "data.dataloader_param.num_workers": num_workers,
    }
    monkeypatch.setattr(sys, "argv", ["flashi2v-train", *workspace.arguments(changes, train_iters=1)])
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("flashi2v-train: cannot read video")
    assert "gone.lmdb --open-videos" in message


def test_a_text_to_video_trunk_is_started_from_and_its_new_layers_are_said_aloud(workspace, tmp_path, caplog):
    arguments = read_run_config(options(workspace)).model.predictor.transformer_arguments()
    model = FlashI2VTransformer3DModel(**arguments).state_dict()
    new = {key for key in model if key.startswith(("fourier_embedding.", "learnable_proj."))}
    trunk = {key: tensor for key, tensor in model.items() if key not in new}
    torch.save(convert_state_dict(trunk, target="wan"), tmp_path / "wan.pt")
    caplog.set_level("INFO")
    start = {"model.predictor.from_pretrained": str(tmp_path / "wan.pt")}
    run(workspace, changes=start, train_iters=1, lr=1e-9)
    assert "wan.pt is a text-to-video trunk: FlashI2V's new layers start at zero" in caplog.text
    trained = weights(workspace.directory / "run", ema=False)
    for key, tensor in trunk.items():
        torch.testing.assert_close(trained[key], tensor, atol=1e-7, rtol=1e-6)
    assert trained["fourier_embedding.1.weight"].abs().max() < 1e-7
    assert trained["learnable_proj.proj.2.weight"].abs().max() < 1e-7


def test_a_step_that_is_not_finite_is_skipped_and_kept_and_a_diverged_run_stops(workspace, monkeypatch, caplog):
    from flashi2v_train.autopsy import load_autopsy
    from flashi2v_train.engines import DirectEngine
    from flashi2v_train.processes import RunError

    compute, calls = DirectEngine.train, []

    def broken(self, series):
        calls.append(series)
        loss = compute(self, series)
        if len(calls) == 2:  # a loss alone
            return loss * float("nan")
        if len(calls) in (4, 5, 6):
            for parameter in self._stage.parameters():
                parameter.grad.mul_(float("inf"))
        return loss

    monkeypatch.setattr(DirectEngine, "train", broken)
    with pytest.raises(RunError, match="3 steps in a row were not finite"):
        run(workspace, train_iters=9, save_interval=3, max_skipped_steps=3)
    saved = weights(workspace.directory / "run", ema=False)  # of step 3, after one skipped step
    assert all(tensor.isfinite().all() for tensor in saved.values())
    kept = sorted((workspace.directory / "run/autopsy").iterdir())
    assert [path.name for path in kept] == [f"step_000000{n}_rank_0.safetensors" for n in (2, 4, 5, 6)]
    (batch,), origins = load_autopsy(kept[0])
    assert batch.keys() == calls[1].batches[0].keys()
    assert all(torch.equal(tensor, calls[1].batches[0][name]) for name, tensor in batch.items())
    assert "step 2 is not finite and is skipped: loss nan" in caplog.text
    assert len(origins) == 2


def test_frozen_parameters_stay_as_they_are(workspace):
    directory = run(workspace, train_iters=3, freeze=["blocks.0.*", "*.attn2.*"], save_interval=1)
    (directory / "latest_checkpointed_iteration.txt").write_text("1\n")
    first = weights(directory, ema=False)
    (directory / "latest_checkpointed_iteration.txt").write_text("3\n")
    for name, tensor in weights(directory, ema=False).items():
        assert torch.equal(tensor, first[name]) == (name.startswith("blocks.0.") or ".attn2." in name), name


def test_validation_is_logged_and_shown(workspace):
    directory = run(workspace, train_iters=3, eval_interval=2, eval_iters=2, eval_videos=1, eval_steps=2, eval_ema=True)
    lines = [json.loads(line) for line in (directory / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert {"validation_loss", "validation_loss/sigma_0.5", *VIDEO_MEASURES} <= lines[0].keys()
    shown = sorted(str(path.relative_to(directory)) for path in (directory / "validation").rglob("*.*"))
    assert shown == [f"validation/step_000000{n}/{name}" for n in (0, 2, 3) for name in ("strip_0.png", "video_0.mp4")]
    assert losses(directory) == losses(run(workspace, "plain", train_iters=3))
    for name in ("train_loss.png", "validation.png"):
        with Image.open(directory / name) as picture:
            assert picture.width > 500
    table = describe(directory).split("\n\n")[1].splitlines()
    assert table[0].split("  ")[-3:] == ["before training", "at step 3", "real clips"]
    assert [line.split("  ")[0] for line in table[1:]] == [
        "loss", "first frame PSNR [dB]", "motion [levels of 255 a frame]", "pixels that stand still",
    ]  # fmt: skip
    said = json.loads((directory / "train_summary.json").read_text())["validation"]
    assert (said["first"], said["last"]) == (lines[0], lines[-1])


def test_clips_that_are_held_out_are_validated_on_and_never_trained_on(workspace):
    changes = {"data.dataset_param.held_out_clips": 3}
    options = {"train_iters": 1, "micro_batch_size": 1, "eval_interval": 9, "eval_iters": 3, "eval_videos": 0}
    directory = run(workspace, changes=changes, global_batch_size=5, **options)
    seen = {}
    for held_out in (False, True):
        data = read_run_config(TrainOptions(**workspace.files(changes), device="cpu")).data
        loader = build_dataloader(data, seed=1024, batch_size=1, held_out=held_out)
        seen[held_out] = {int(batch["index"][0]) for _, batch in zip(range(16), loader)}
    assert seen == {False: {0, 2, 3, 5, 7}, True: {1, 4, 6}}
    # What is held out is what another run would have to be given as data of its own.
    validated = json.loads((directory / "validation.jsonl").read_text().splitlines()[0])["validation_loss"]
    other = run(workspace, "other", **options)
    assert validated != json.loads((other / "validation.jsonl").read_text().splitlines()[0])["validation_loss"]
    with pytest.raises(InputError, match="fewer than the 6 of one optimizer step"):
        run(workspace, "too_many", changes=changes, **options, global_batch_size=6)


def test_the_seed_files_are_understood_as_printed(tmp_path):
    """The documents' own formatting: comments, a trailing comma, full sizes."""
    (tmp_path / "model.json").write_text(
        """# pretrain_model_flashi2v.json
        {"load_video_features": false, "load_text_features": false, "task": "t2v",
         "patch": {"ae_float32": "ae_float32"},
         "ae": {"model_id": "wan_video_vae", "from_pretrained": "vae/", # Wan2.1 VAE
                "dtype": "fp32", "enable_tiling": false,
                "tiling_param": {"tile_size": [34, 34], "tile_stride": [18, 16]},
                "norm_latents": true, "norm_mode": "channel_specified_shift_scale", "do_sample": true},
         "text_encoder": {"model_id": "UMT5", "dtype": "bf16", "hub_backend": "hf",
                          "from_pretrained": "text_encoder", "use_attention_mask": false},
         "diffusion": {"model_id": "flow_matching", "use_dynamic_shifting": true,
                       "use_logitnorm_time_sampling": true,},
         "predictor": {"model_id": "flashi2vdit", "low_freq_energy_ratio": [0.05, 0.95], "fft_return_abs": true,
                       "dtype": "bf16", "patch_size": [1, 2, 2], "text_len": 512, "in_dim": 16, "hidden_size": 1536,
                       "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096, "img_dim": 1280, "out_dim": 16,
                       "num_heads": 12, "num_layers": 30, "pipeline_num_layers": [7,8,8,7], "qk_norm": true,
                       "qk_norm_type": "rmsnorm", "cross_attn_norm": true, "eps": 1e-6, "max_seq_len": 1024,
                       "attention_async_offload": false, "use_fused_rmsnorm": true,
                       "from_pretrained": "release_weights/npu/flashi2v_1_3B.pt" # Pretrained weights
         }}"""
    )
    model = load_config(tmp_path / "model.json", TrainModelConfig)
    assert model.predictor.transformer_arguments()["attention_head_dim"] == 128
    assert model.predictor.eps == 1e-6
    assert model.predictor.conv3x3x3_proj is True


def test_wandb_that_is_not_installed_is_said_before_anything_starts(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'flashi2v-train\[wandb\]'"):
        read_run_config(options(workspace, wandb_project="flashi2v"))


@pytest.fixture
def two_steps(workspace):
    return run(workspace, train_iters=2)


@pytest.mark.parametrize(
    ("changes", "values", "words"),
    [
        ({"model.predictor.num_layers": 1}, {}, "the checkpoint alone has"),
        ({"model.predictor.num_layers": 3}, {}, "the run alone has"),
        ({"model.predictor.eps": 1e-5}, {}, "was trained with eps 1e-06, this run has 1e-05"),
        ({}, {"use_ema": False, "ema_decay": 0.9999}, "--use-ema"),
        ({}, {"seed": 7}, "seed"),
        ({"data.dataset_param.text_drop_ratio": 0.1}, {"load": "elsewhere"}, None),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(workspace, two_steps, changes, values, words):
    """What is in --save goes before --load, so that a restarted command never falls back."""
    if words is None:
        run(workspace, changes=changes, train_iters=3, **values)
        return
    with pytest.raises(ValueError, match=words):
        run(workspace, changes=changes, train_iters=3, **values)


def test_a_damaged_or_dangerous_checkpoint_is_refused(workspace, two_steps):
    table = two_steps / "iter_0000002" / ".metadata"
    whole = table.read_bytes()
    (two_steps / "iter_0000002" / CHECKSUMS).unlink()
    table.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="no place in it"):
        run(workspace, train_iters=3)
    table.write_bytes(whole)
    (two_steps / "latest_checkpointed_iteration.txt").write_text("release\n")
    with pytest.raises(ValueError, match="'release'"):
        run(workspace, train_iters=3)


def test_behind_a_damaged_checkpoint_a_run_goes_on_from_the_one_before_as_if_nothing_were(workspace):
    whole = run(workspace, "whole", train_iters=3, save_interval=1)
    damaged = run(workspace, train_iters=2, save_interval=1)
    [file] = (damaged / "iter_0000002").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"__0_0.distcp is damaged: .* --load-iteration 1 goes on") as failure:
        run(workspace, train_iters=3, save_interval=1)
    assert len(str(failure.value)) < 500
    with pytest.raises(InputError, match="there is no such checkpoint, only 2, 1"):
        run(workspace, train_iters=3, load_iteration=7)
    run(workspace, train_iters=3, save_interval=1, load_iteration=1)
    assert losses(damaged) == losses(whole)
    assert_same_weights(whole, damaged)
    assert file.read_bytes() != bytes(content), "it was written anew"


def test_two_runs_do_not_write_to_one_directory(workspace, two_steps):
    holder = "import sys, time; from flashi2v_data.locking import hold\nwith hold(sys.argv[1], 'x'): print(); input()"
    command = [sys.executable, "-c", holder, str(two_steps / ".lock")]
    before = sorted(two_steps.iterdir())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        with pytest.raises(InputError, match=rf"--save .*run is in use by another process \(process {other.pid} on"):
            run(workspace, train_iters=3)
        other.kill()  # the system gives its lock free, whatever it left
    assert sorted(path for path in two_steps.iterdir() if path.name != ".lock") == before
    run(workspace, train_iters=3)
    assert not (two_steps / ".lock").exists()


def test_a_run_may_start_from_anothers_checkpoint(workspace, two_steps):
    other = run(workspace, "other", train_iters=3, load=two_steps)
    assert len(losses(other)) == 1


def test_bad_input_found_by_a_worker_process_is_one_line_too(workspace):
    changes = {"model.predictor.in_dim": 8, "model.predictor.out_dim": 8}
    stderr = launch(workspace.arguments(changes, nproc_per_node=2), code=2)
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("flashi2v-train: ")
    assert "the encoder gives 16" in last


RANGE = [
    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [32, 32]}},
    {"trans_type": "ToTensorVideo"},
    {"trans_type": "norm_fun", "param": {"mean": 0.0, "std": 1.0}},
]
BAD_INPUT = {
    "missing model file": ({}, {"mm_model": "nowhere.json"}, "nowhere.json"),
    "unknown key": ({"model.predictor.hiden_size": 3}, {}, "predictor.hiden_size"),
    "nearest key": ({"model.predictor.hiden_size": 3}, {}, "'hidden_size'"),
    "wrong type": ({"model.predictor.num_layers": "many"}, {}, "predictor.num_layers"),
    "stages do not sum": ({"model.predictor.pipeline_num_layers": [7, 8]}, {}, "sums to 15"),
    "features in one file": ({"model.load_video_features": True}, {}, "load_video_features is true in"),
    "features in the other file": (
        {"data.dataset_param.load_text_features": True, "data.dataset_param.features_path": "features"},
        {},
        "and true in",
    ),
    "no such features": (
        {
            "model.load_text_features": True,
            "data.dataset_param.load_text_features": True,
            "data.dataset_param.features_path": "nowhere",
        },
        {},
        "no store that flashi2v-encode has finished",
    ),
    "memory for nothing": (
        {
            "model.load_video_features": True,
            "model.load_text_features": True,
            "data.dataset_param.load_video_features": True,
            "data.dataset_param.load_text_features": True,
            "data.dataset_param.features_path": "nowhere",
        },
        {"feature_cache_gib": 1},
        "--feature-cache-gib has no effect",
    ),
    "layout": ({}, {"tensor_model_parallel_size": 2}, "must divide the 1 processes"),
    "pipeline of too few": ({}, {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}, "too few to fill a pipeline"),
    "unbalanced": (
        {"model.predictor.num_layers": 24, "model.predictor.pipeline_num_layers": [1, 1, 1, 21]},
        {"nproc_per_node": 4, "pipeline_model_parallel_size": 4, "global_batch_size": 4},
        "more to do than with",
    ),
    "weights of another size": (
        {"model.predictor.from_pretrained": "OTHER"},
        {},
        "does not fit",
    ),
    "missing weights": ({"model.predictor.from_pretrained": "nowhere.pt"}, {}, "nowhere.pt does not exist"),
    "set smaller than a step": ({}, {"global_batch_size": 64}, "fewer than the 64 of one optimizer step"),
    "frozen": ({}, {"freeze": "nothing.*"}, "no parameter is called so"),
    "recompute": ({}, {"recompute_granularity": "full"}, "--recompute-method"),
    "evaluation data": ({}, {"eval_data": "nowhere.json", "eval_interval": 5}, "nowhere.json"),
    "evaluation never": ({}, {"eval_videos": 3}, "--eval-videos has no effect without --eval-interval"),
    "decay that is not chosen": ({}, {"lr_wsd_decay_style": "linear"}, "without --lr-decay-style WSD"),
    "missing vae": ({"model.ae.from_pretrained": "nowhere/vae"}, {}, "nowhere/vae"),
    "height": ({"data.dataset_param.sample_height": 40}, {}, "divisible by 16"),
    "frames": ({"data.dataset_param.sample_num_frames": 6}, {}, "4k+1"),
    "text length": ({"data.dataset_param.tokenizer_max_length": 8}, {}, "predictor.text_len 16"),
    "no mask": ({"data.dataset_param.return_prompt_mask": False}, {}, "return_prompt_mask"),
    "missing store": ({"data.dataset_param.metafile_or_dir_path": "nowhere.lmdb"}, {}, "nowhere.lmdb"),
    "batch does not divide": ({}, {"micro_batch_size": 2, "global_batch_size": 3}, "multiple"),
    "pixel range": ({"data.dataset_param.transform_pipeline.video": RANGE}, {}, "the VAE reads [-1, 1]"),
    "fp16": ({"model.predictor.dtype": "fp16"}, {}, "predictor.dtype"),
    "a number as text": ({"model.predictor.num_layers": "2"}, {}, "predictor.num_layers"),
    "save is a file": ({}, {"save": __file__ + "/run"}, "--save"),
    "negative rate": ({}, {"lr": -1}, "--lr"),
    "unknown option": ({}, {"learning_rate": 1}, "--learning-rate"),
    "no checkpoint": ({}, {"load": "nowhere"}, "holds no checkpoint"),
    "latent channels": ({"model.predictor.in_dim": 8, "model.predictor.out_dim": 8}, {}, "the encoder gives 16"),
    "absent device": ({}, {"device": "npu"}, "torch_npu"),
    "store too small": ({}, {"micro_batch_size": 99}, "99"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(workspace, inputs, case, monkeypatch, capsys):
    from flashi2v_train import launcher

    changes, changed_options, words = BAD_INPUT[case]
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which asking for an NPU adds to
    if "OTHER" in changes.values():
        changes = {"model.predictor.from_pretrained": str(inputs / "model/transformer")}
    monkeypatch.setattr(
        sys, "argv", ["flashi2v-train", *workspace.arguments(changes, train_iters=1, **changed_options)]
    )
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2, message
    assert words in message
    assert message.startswith("flashi2v-train: ")
    assert not (workspace.directory / "run").exists()
