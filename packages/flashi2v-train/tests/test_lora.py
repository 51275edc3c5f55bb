"""LoRA training: what its checkpoints hold, what is made of them, exact resumes, what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model import cli as model_cli
from flashi2v_model.transformer import EMBED_INPUTS
from flashi2v_model.weights.checkpoint import load_stored
from flashi2v_train.config import TrainOptions, read_run_config
from flashi2v_train.dry_run import describe_run
from flashi2v_train.recipe import example
from flashi2v_train.start import command as start
from flashi2v_train.start.memory import LORA_SAVINGS, measure, num_samples
from flashi2v_train.start.options import InitOptions
from flashi2v_train.trainer import Trainer, train
from flashi2v_train.world import join_world

STEPS = 3
ALSO = ["learnable_proj", "fourier_embedding"]
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_also": ALSO}


def options(workspace, base, name="run", **values) -> TrainOptions:
    files = workspace.files({"model.predictor.from_pretrained": str(base)})
    usual = {"train_iters": STEPS, "save_interval": 1, "lr": 1e-2, "ema_decay": 0.5, "device": "cpu"}
    return TrainOptions(**files, save=workspace.directory / name, **usual | values)


class Trained(NamedTuple):
    base: Path
    run: Path
    outputs: dict[bool, torch.Tensor]  # of the run's own network, by its average and by its raw weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory, new_workspace) -> Trained:
    workspace = new_workspace(tmp_path_factory.mktemp("lora"))
    base = workspace.base()
    plan = options(workspace, base, **LORA, eval_interval=STEPS, eval_iters=2, eval_videos=0, eval_ema=True)
    config = read_run_config(plan)
    run = train(config)
    with join_world("cpu", config.parallel_dims(1)) as world:
        trainer = Trainer(config, world)
        with trainer.ema.in_place():
            average = trainer.engine.velocity(inputs(config))
        return Trained(base, run, {True: average, False: trainer.engine.velocity(inputs(config))})


def inputs(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {key: torch.randn(t.shape, generator=generator) for key, t in example(config)[0].items()}
    return given | {"timestep": torch.tensor([400.0]), "low_freq_energy_ratio": torch.tensor([0.3])}


@pytest.fixture
def sampled(workspace, trained):
    """Return what a transformer makes of the inputs."""
    given = inputs(read_run_config(options(workspace, trained.base, **LORA)))

    @torch.no_grad()
    def sample(transformer):
        return transformer(**{name: given[name] for name in EMBED_INPUTS}).sample

    return sample


def losses(run: Path, file="metrics.jsonl", key="loss") -> list[float]:
    return [json.loads(line)[key] for line in (run / file).read_text().splitlines()]


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    from flashi2v_model.weights.checkpoint import SafeReader

    contents = SafeReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in contents.items()}
    load_stored(checkpoint, tensors)
    return tensors


def test_a_checkpoint_holds_what_was_trained_and_nothing_else(trained):
    held = state(trained.run / f"iter_{STEPS:07d}")
    names = {key.removeprefix("model.") for key in held if key.startswith("model.")}
    whole = {name for name in names if ".lora_" not in name}
    assert {name.split(".")[0] for name in whole} == {*ALSO}
    assert len(names - whole) == 2 * 2 * 10  # A and B, of two blocks' matrices
    assert {key.split(".")[0] for key in held} == {"model", "ema", "optimizer"}
    assert all(held[f"ema.{name}"].shape == held[f"model.{name}"].shape for name in names)
    assert all(held[f"optimizer.{name}.exp_avg"].any() for name in names)
    assert not any(torch.equal(held[f"ema.{name}"], held[f"model.{name}"]) for name in names)
    before, after = losses(trained.run, "validation.jsonl", "validation_loss")
    assert before != after


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(workspace, trained):
    run = shutil.copytree(trained.run, workspace.directory / "run")
    (run / "latest_checkpointed_iteration.txt").write_text("1\n")
    train(read_run_config(options(workspace, trained.base, **LORA)))
    assert losses(run) == losses(trained.run)
    ours, theirs = state(run / f"iter_{STEPS:07d}"), state(trained.run / f"iter_{STEPS:07d}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("to", "ema"),
    [
        *(("run", True), ("diffusers", True), ("comfyui", True), ("whole model", True)),
        *(("diffusers", False), ("comfyui", False), ("whole model", False)),
    ],
)
def test_what_was_trained_is_what_samples(trained, sampled, tmp_path, to, ema, capsys):
    weights = "ema" if ema else "raw"
    place = tmp_path / "model" if to == "whole model" else tmp_path / "lora.safetensors"
    if to == "whole model":
        model_cli.convert(trained.run, place, to="diffusers", weights=weights)
        transformer = FlashI2VTransformer3DModel.from_pretrained(place)
    else:
        transformer = FlashI2VTransformer3DModel.from_pretrained(trained.base)
        if to == "run":  # by its average
            place = trained.run
        else:
            model_cli.convert(trained.run, place, to=to, weights=weights)
            prefix = {"diffusers": "transformer.", "comfyui": "diffusion_model."}[to]
            assert all(key.startswith(prefix) for key in load_file(place))
        plain = sampled(transformer)
        transformer.load_lora_adapter(place)
        assert (sampled(transformer) - plain).abs().max() > 1e-2
    torch.testing.assert_close(sampled(transformer), trained.outputs[ema], atol=2e-5, rtol=1e-4)
    model_cli.inspect(trained.run)
    told = capsys.readouterr().out
    assert "LoRA adapter of" in told
    assert "alpha                8 (weight 2)" in told


def test_another_run_goes_on_from_an_adapter(workspace, trained):
    """Its rank, alpha, layers and the parts that were trained whole are those of the adapter."""
    for source in (trained.run, workspace.directory / "lora.safetensors"):
        if source != trained.run:
            model_cli.convert(trained.run, source, to="comfyui")
        config = read_run_config(options(workspace, trained.base, source.stem, lora_from=str(source)))
        with join_world("cpu", config.parallel_dims(1)) as world:
            trainer = Trainer(config, world)
            assert {name.split(".")[0] for name in trainer.parameters} == {"blocks", *ALSO}
            assert trainer.transformer_config["_lora"]["lora_alpha"] == 8
            torch.testing.assert_close(
                trainer.engine.velocity(inputs(config)), trained.outputs[True], atol=2e-5, rtol=1e-4
            )


def test_a_trunk_gets_its_new_layers_trained_beside_the_adapters(workspace, trained, sampled, tmp_path):
    trunk = shutil.copytree(trained.base, workspace.directory / "trunk")
    file = trunk / "diffusion_pytorch_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if key.split(".")[0] not in ALSO}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"--lora-also fourier_embedding --lora-also learnable_proj"):
        train(read_run_config(options(workspace, trunk, lora_rank=4)))
    run = train(read_run_config(options(workspace, trunk, **LORA)))
    with pytest.raises(ValueError, match="without fourier_embedding, learnable_proj, which an adapter cannot add"):
        model_cli.convert(run, tmp_path / "lora.safetensors", to="diffusers")
    model_cli.convert(run, tmp_path / "model", to="diffusers", weights="raw")
    config = read_run_config(options(workspace, trunk, **LORA))
    with join_world("cpu", config.parallel_dims(1)) as world:
        own = Trainer(config, world).engine.velocity(inputs(config))
    written = FlashI2VTransformer3DModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(sampled(written), own, atol=2e-5, rtol=1e-4)


def test_adapters_are_kept_in_fp32_on_a_model_in_bf16(workspace, trained):
    config = read_run_config(options(workspace, trained.base, lora_rank=2, bf16=True, train_iters=1))
    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = Trainer(config, world).stages
        dtypes = {(".lora_" in name, p.requires_grad): p.dtype for name, p in stage.named_parameters()}
    assert dtypes == {(True, True): torch.float32, (False, False): torch.bfloat16}
    assert len(losses(train(config))) == 1


def other_base(workspace, trained) -> Path:
    other = shutil.copytree(trained.base, workspace.directory / "other")
    file = other / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.attn1.to_q.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return other


REFUSED_RESUMES = {
    "all weights": ({}, "is of another model, --use-ema, --freeze or LoRA"),
    "another rank": (LORA | {"lora_rank": 5}, "was trained with lora_rank 4, this run has 5"),
    "another alpha": (LORA | {"lora_alpha": 4.0}, "was trained with lora_alpha 8.0, this run has 4.0"),
    "less beside": (LORA | {"lora_also": []}, "the checkpoint alone has ema.fourier_embedding"),
    "other layers": (LORA | {"lora_targets": ["to_q"]}, "the checkpoint alone has ema.blocks.0.attn1.to_k.lora_A"),
}


@pytest.mark.parametrize("case", REFUSED_RESUMES)
def test_a_run_goes_on_as_it_was_only(workspace, trained, case):
    changes, words = REFUSED_RESUMES[case]
    shutil.copytree(trained.run, workspace.directory / "run")
    with pytest.raises(ValueError, match=words):
        train(read_run_config(options(workspace, trained.base, **changes)))


def test_adapters_go_on_and_are_merged_on_their_own_model_only(workspace, trained, tmp_path):
    run = shutil.copytree(trained.run, workspace.directory / "run")
    with pytest.raises(ValueError, match="was trained with base_weights blake2b:"):
        train(read_run_config(options(workspace, other_base(workspace, trained), **LORA)))
    config = run / f"iter_{STEPS:07d}/config.json"
    written = config.read_text().replace(str(trained.base), str(workspace.directory / "other"))
    for name in ("config.json", "checksums.json"):
        (config.parent / name).unlink(missing_ok=True)
    config.write_text(written)
    with pytest.raises(ValueError, match="is no longer the model that"):
        model_cli.convert(run, tmp_path / "model", to="diffusers")
    config.write_text(written.replace("/other", "/nowhere"))
    with pytest.raises(ValueError, match="which is not there: start this where the training was started"):
        model_cli.convert(run, tmp_path / "model", to="diffusers")


BAD_INPUT = {
    "rank": ({"lora_rank": 49}, "--lora-rank 49 is above the width 48 of blocks.0.attn1.to_k: take a smaller one"),
    "target": ({"lora_rank": 2, "lora_targets": "to_x"}, "--lora-targets to_x: no matrix is called so; names end in"),
    "part": ({"lora_rank": 2, "lora_also": "blocks"}, "--lora-also blocks: there is no such part to train whole"),
    "alone": ({"lora_alpha": 2}, "--lora-alpha has no effect without --lora-rank or --lora-from"),
    "said twice": ({"lora_rank": 2, "lora_from": "x"}, "--lora-rank is said by the adapter of --lora-from"),
    "frozen": ({"lora_rank": 2, "freeze": "proj_out.*"}, "--freeze has no effect with LoRA"),
    "no adapter": ({"lora_from": "nowhere.safetensors"}, "--lora-from nowhere.safetensors: no LoRA adapter at"),
    "another width": ({"lora_from": "WIDE"}, "it does not fit the transformer: blocks.0.attn1.to_q.lora_A.weight is"),
    "a norm": ({"lora_from": "NORM"}, "it changes blocks.0.norm2.lora_diff.bias, which is not trained: merge it"),
    "no model": ({"lora_rank": 2, "base": None}, "LoRA changes a trained model: set predictor.from_pretrained"),
}
ADAPTERS = {
    "WIDE": {"blocks.0.attn1.to_q.lora_A.weight": (2, 64), "blocks.0.attn1.to_q.lora_B.weight": (64, 2)},
    "NORM": {"blocks.0.norm2.diff_b": (48,)},
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(workspace, trained, case, monkeypatch, capsys):
    from flashi2v_train import launcher

    given, words = BAD_INPUT[case]
    given = dict(given)
    changes = {"model.predictor.from_pretrained": str(trained.base)}
    if "base" in given:
        changes = {}
        del given["base"]
    if (shapes := ADAPTERS.get(given.get("lora_from"))) is not None:
        given["lora_from"] = workspace.directory / "adapter.safetensors"
        names = {key.replace("norm2.diff_b", "norm2.lora_diff.bias"): shape for key, shape in shapes.items()}
        save_file({key: torch.ones(shape) for key, shape in names.items()}, given["lora_from"])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", ["flashi2v-train", *workspace.arguments(changes, train_iters=1, **given)])
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2, message
    assert words in message
    assert not (workspace.directory / "run").exists()


def prepare(workspace, inputs, base, **lora) -> str:
    """Make the files of a run; return run.sh."""
    wanted = {"size": "32x32", "frames": 5, "train_iters": 2, "device": "cpu", "memory": 4.0, "nproc_per_node": 1}
    options = InitOptions(videos=inputs / "shapes/videos.json", start=str(base), lora=True, **wanted, **lora)
    start.prepare(workspace.directory / "new", options)
    return (workspace.directory / "new/run.sh").read_text()


def test_init_writes_a_run_of_adapters(workspace, inputs):
    script = prepare(workspace, inputs, inputs / "model")
    assert "--lora-rank 16" in script
    assert "lora-comfyui.safetensors" in script
    assert f'--model {inputs / "model"} --lora "$RUN/lora.safetensors"' in script
    assert "--encoders" not in script


def test_init_trains_what_a_trunk_lacks_beside_the_adapters(workspace, inputs):
    trunk = shutil.copytree(inputs / "model", workspace.directory / "trunk")
    config = trunk / "transformer/config.json"
    config.write_text(config.read_text().replace("FlashI2VTransformer3DModel", "WanTransformer3DModel"))
    script = prepare(workspace, inputs, trunk, lora_rank=4)
    assert "--lora-rank 4 --lora-also learnable_proj --lora-also fourier_embedding" in script
    assert '--model "$RUN/model" --image' in script
    assert f"--encoders {trunk}" in script
    assert "lora.safetensors" not in script


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"lora_rank": 200}, "--lora-rank 200 is above the width 128 of blocks.0.attn1.to_k"),
        ({"lora_from": "WIDE"}, r"it does not fit the transformer: blocks.0.attn1.to_q.lora_A.weight is \(2, 64\)"),
        ({"lora_from": "nowhere", "lora_rank": 2}, "--lora-rank is said by the adapter of --lora-from"),
    ],
)
def test_init_refuses_what_does_not_fit_before_it_writes(workspace, inputs, lora, words):
    if lora.get("lora_from") == "WIDE":
        lora = {"lora_from": str(workspace.directory / "wide.safetensors")}
        save_file({key: torch.ones(shape) for key, shape in ADAPTERS["WIDE"].items()}, lora["lora_from"])
    with pytest.raises(ValueError, match=words):
        prepare(workspace, inputs, inputs / "model", **lora)
    assert not [*workspace.directory.glob("*new*")]


def test_a_dry_run_says_what_cards_hold(workspace, trained):
    config = read_run_config(options(workspace, trained.base, **LORA, dry_run=True))
    told = describe_run(config, config.parallel_dims(1)).splitlines()
    (head,) = (number for number, line in enumerate(told) if line.startswith("GiB on one card"))
    names = ["as it is", "layers computed twice", "... and the model in 8 bits"]
    assert [line[:30].strip() for line in told[head + 1 : head + 4]] == names
    held = [[int(word) for word in line[30:].split()[2:]] for line in told[head + 1 : head + 4]]
    assert all(row == sorted(row) and row[0] > 0 for row in held)
    plain, again = (measure(config, 1, saving) for saving in LORA_SAVINGS[:2])
    assert plain > again
    assert (num_samples(7.3, 3.6, 24), num_samples(44.0, 12.7, 48), num_samples(44.0, 12.7, 80)) == (4, 0, 2)
