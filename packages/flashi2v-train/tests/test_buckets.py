"""Clips of several shapes in one run, beside what test_layouts compares on several processes."""

import json

import pytest
import torch
from world import BUCKETS

from flashi2v_data.errors import InputError
from flashi2v_train import launcher
from flashi2v_train.batch import Series, join
from flashi2v_train.config import read_run_config
from flashi2v_train.engines import DirectEngine
from flashi2v_train.features import FeatureSource
from flashi2v_train.lora import plan_adapters
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallelise import build_stages
from flashi2v_train.provenance import provenance
from flashi2v_train.recipe import draw_series
from flashi2v_train.world import join_world


def read(workspace, changes, **options):
    return read_run_config(TrainOptions(**workspace.files(changes), device="cpu", **options))


def steps(config, number: int) -> list[Series]:
    with join_world("cpu", config.parallel_dims(1)) as world:
        source = FeatureSource(config, world)
        found = [next(source) for _ in range(number)]
        source.close()
        return [draw_series(config, series, [origin.key for origin in keys], world.device) for series, keys in found]


def test_the_loss_is_the_mean_over_all_samples_whatever_their_micro_batch(workspace, mixed):
    config = read(workspace, mixed, micro_batch_size=2, global_batch_size=8)
    series = next(found for found in steps(config, 6) if len({len(batch["sigma"]) for batch in found.batches}) > 1)
    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = build_stages(config, world, weights=False, adapters=plan_adapters(config))
        loss = DirectEngine(stage, config.recipe).train(series)
        velocity = DirectEngine(stage, config.recipe).velocity
        every = torch.cat(
            [config.recipe.loss(velocity(config.recipe.inputs(b)), config.recipe.target(b)) for b in series.batches]
        )
    assert len(every) == sum(series.counts)
    torch.testing.assert_close(loss, every.mean())


def test_every_sample_has_its_own_noise_level_and_its_buckets_shape(workspace, mixed):
    found = steps(read(workspace, mixed, micro_batch_size=2, global_batch_size=4), 3)
    sigmas = torch.cat([batch["sigma"] for series in found for batch in series.batches])
    assert len(sigmas.unique()) == len(sigmas)
    for series in found:
        for bucket, batch in zip(series.buckets, series.batches):
            frames, height, width = BUCKETS[bucket]
            assert batch["latents"].shape[2:] == batch["noise"].shape[2:] == (frames // 4 + 1, height // 8, width // 8)


def test_an_image_trains_the_trunk_and_sees_no_condition(workspace, mixed):
    config = read(workspace, mixed, micro_batch_size=2, global_batch_size=8)
    images = join([b for found in steps(config, 6) for n, b in zip(found.buckets, found.batches) if BUCKETS[n][0] == 1])
    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = build_stages(config, world, weights=False, adapters=plan_adapters(config))
        new_layers = ("fourier_embedding", "learnable_proj")
        with torch.no_grad():
            for parameter in stage.transformer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        engine = DirectEngine(stage, config.recipe)
        engine.train(Series([images], [2], [0, 0, len(images["sigma"])]))
        for name, parameter in stage.transformer.named_parameters():
            assert bool(parameter.grad.any()) != name.startswith(new_layers), name
        inputs = config.recipe.inputs(images)
        other = inputs | {"condition": torch.randn_like(inputs["condition"])}
        assert torch.equal(engine.velocity(inputs), engine.velocity(other))


def test_what_cannot_be_trained_is_one_line_before_a_step_is_taken(workspace, mixed, monkeypatch, capsys):
    for changes, options, words in (
        ({"data.dataset_param.buckets": [*BUCKETS, [5, 16, 32]]}, {}, "goes to 5x16x32: take it out"),
        ({"data.dataset_param.buckets": [*BUCKETS, [5, 40, 32]]}, {}, "height of 5x40x32 must be divisible by 16"),
        ({}, {"global_batch_size": 64}, "lower --global-batch-size"),
    ):
        monkeypatch.setattr("sys.argv", ["flashi2v-train", *workspace.arguments(mixed | changes, **options)])
        with pytest.raises(SystemExit) as stop:
            launcher.main()
        assert stop.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert not (workspace.directory / "run").exists()


def test_a_dry_run_says_what_clips_of_each_bucket_cost(workspace, mixed, capsys):
    arguments = workspace.arguments(mixed | {"data.dataset_param.buckets": "auto"}, micro_batch_size=2)
    launcher.app([*arguments, "--dry-run"], result_action="return_value")
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if line.startswith("  ")]
    for bucket, clips, tokens in (("5x32x32", "8", "8"), ("5x32x16", "7", "4"), ("1x32x32", "8", "4")):
        assert any(row[:3] == [bucket, clips, tokens] and row[-1] == "2" for row in table)
    assert "clips too short for each: 1; a rank waits 0.0% of a step for others" in out
    assert "a clip costs about its tokens to the power of" in out


def test_features_and_validation_know_of_buckets(workspace, mixed):
    config = read(workspace, mixed)
    assert provenance(config, text=False)["buckets"] == sorted(BUCKETS)
    assert provenance(read(workspace, {}), text=False)["buckets"] is None
    other = workspace.directory / "other.json"
    workspace.files(mixed | {"data.dataset_param.buckets": BUCKETS[:2]})["mm_data"].rename(other)
    with pytest.raises(InputError, match=r"--eval-data .*other.json: buckets are not those of"):
        read(workspace, mixed, eval_interval=1, eval_data=other)


def test_validation_looks_at_clips_of_the_samples_shape(workspace, mixed, capsys):
    options = {"train-iters": 1, "eval-interval": 1, "eval-iters": 2, "eval-videos": 1, "eval-steps": 1}
    changes = mixed | {"data.dataset_param.held_out_clips": 2}
    launcher.app(workspace.arguments(changes, **options), result_action="return_value")
    lines = (workspace.directory / "run/validation.jsonl").read_text().splitlines()
    assert all(json.loads(line)["validation_loss"] > 0 for line in lines)
    assert (workspace.directory / "run/validation/step_0000001/strip_0.png").exists()
