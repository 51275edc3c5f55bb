"""Clipping, EMA, learning rate and draws against reference numbers and by their properties."""

from datetime import timedelta

import pytest
import torch
from torch import nn

from flashi2v_data import generator
from flashi2v_data.errors import InputError
from flashi2v_train.batch import Batch, chunk, join, to
from flashi2v_train.clip import AdaptiveClip, PlainClip
from flashi2v_train.config import RunConfig, TrainOptions, read_run_config
from flashi2v_train.ema import EMA
from flashi2v_train.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from flashi2v_train.parallelise import build_stages
from flashi2v_train.world import join_world

# (norm, norm after clipping, threshold, mean, variance) of the public NPU release, max_norm 1.0, decay 0.99
CLIP_TRACE = (
    (0.8, 0.800000, 1.0, 1.0, 0.0),
    (1.2, 0.999999, 1.0, 1.0, 0.0),
    (0.9, 0.900000, 1.0, 0.9990000128746033, 9.801006672205403e-05),
    (0.7, 0.700000, 1.0286999940872192, 0.9960100650787354, 0.00097324961097911),
    (1.1, 1.089600, 1.089600920677185, 0.9960100650787354, 0.00097324961097911),
    (0.95, 0.950000, 1.089600920677185, 0.9955499768257141, 0.0009842651197686791),
    (6.0, 1.089669, 1.0896689891815186, 0.9955499768257141, 0.0009842651197686791),
    (0.85, 0.850000, 1.0896689891815186, 0.9940944910049438, 0.0011820546351373196),
    (0.9, 0.900000, 1.0972375869750977, 0.9931535720825195, 0.0012570100370794535),
    (30.0, 0.0, 1.0995166301727295, 0.9931535720825195, 0.0012570100370794535),
    (0.8, 0.800000, 1.0995166301727295, 0.991222083568573, 0.0016100987559184432),
    (1.0, 1.000000, 1.1116001605987549, 0.9913098812103271, 0.0015947530046105385),
)


def test_adaptive_clipping_follows_the_reference_trace_across_a_resume():
    clip = AdaptiveClip(1.0, 0.99)
    for i, (norm, after, _, mean, variance) in enumerate(CLIP_TRACE):
        if i == 6:
            state, clip = clip.state_dict(), AdaptiveClip(1.0, 0.99)
            clip.load_state_dict(state)
        assert norm * clip.factor(norm) == pytest.approx(after, abs=2e-6)
        assert clip.mean == pytest.approx(mean, abs=1e-6)
        assert clip.variance == pytest.approx(variance, abs=1e-6)


def test_plain_clipping_equals_torch():
    parameter = nn.Parameter(torch.zeros(3))
    for gradient in (torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.3, 0.4, 0.0])):
        parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(gradient * PlainClip(1.0).factor(norm.item()), parameter.grad)


def test_ema_equals_the_reference():
    steps = torch.tensor([[1.0, 2.0, -1.0], [1.5, 1.0, 0.0], [2.0, 0.0, 1.0], [2.5, -1.0, 2.0]])
    shadows = torch.tensor([[1.0, 2.0, -1.0], [1.05, 1.9, -0.9], [1.145, 1.71, -0.71], [1.2805, 1.439, -0.439]])
    parameter = nn.Parameter(steps[0].clone())
    ema = EMA([("p", parameter)], decay=0.9)
    for step, shadow in zip(steps[1:], shadows[1:]):
        parameter.data.copy_(step)
        ema.update()
        torch.testing.assert_close(ema.shadows["p"], shadow, atol=1e-7, rtol=1e-6)


def options(**changes) -> TrainOptions:
    return TrainOptions(mm_model="m.json", mm_data="d.json", **changes)


def test_learning_rate_warms_up_and_decays():
    plan = options(lr=1.0, lr_warmup_iters=4, lr_warmup_init=0.2, train_iters=9, min_lr=0.1, lr_decay_style="linear")
    rates = [learning_rate(step, plan) for step in range(9)]
    assert rates[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    cosine = options(lr=1.0, train_iters=11, lr_decay_style="cosine")
    assert learning_rate(5, cosine) == pytest.approx(0.5)
    assert learning_rate(10**6, options(lr=3e-5)) == 3e-5


def test_freezing_goes_by_pattern():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]), "head": nn.Linear(1, 1)})
    freeze(model, ["blocks.[01].*", "head.bias"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"blocks.2.weight", "blocks.2.bias", "head.weight"}
    optimizer = build_optimizer(dict(model.named_parameters()), options())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    with pytest.raises(InputError, match=r"--freeze block\.\*: no parameter is called so; names are like blocks"):
        freeze(model, ["block.*"])
    with pytest.raises(InputError, match="nothing to train"):
        freeze(model, ["*"])


def test_the_average_can_take_the_weights_place_for_a_while():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA([("p", parameter)], decay=0.5)
    parameter.data.fill_(3.0)
    with ema.in_place():
        assert parameter.tolist() == [1.0, 2.0]
    assert parameter.tolist() == [3.0, 3.0]
    assert ema.shadows["p"].tolist() == [1.0, 2.0]


def test_the_projection_learns_at_its_own_rate():
    model = nn.ModuleDict({"learnable_proj": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    optimizer = build_optimizer(dict(model.named_parameters()), options(proj_lr_scale=10.0))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model["learnable_proj"].weight)] == 5.0
    assert rates[id(model["other"].bias)] == 0.5


def draw(config: RunConfig, keys: list[tuple[int, int]]) -> Batch:
    return config.recipe.draw(config, lambda purpose: [generator(config.options.seed, purpose, *key) for key in keys])


def test_draws_depend_on_seed_epoch_and_sample_alone(workspace):
    config = read_run_config(options().model_copy(update=workspace.files()))
    keys = [(0, 3), (1, 3), (0, 5)]
    together, alone = draw(config, keys), draw(config, keys[1:2])
    for name, value in together.items():
        assert torch.equal(value[1:2], alone[name]), name
        assert not torch.equal(value[0], value[1]), name
        assert not torch.equal(value[0], value[2]), name


def test_drawn_ratios_stay_in_the_configured_range(workspace):
    config = read_run_config(
        options().model_copy(update=workspace.files({"model.predictor.low_freq_energy_ratio": [0.2, 0.3]}))
    )
    ratios = draw(config, [(0, i) for i in range(200)])["low_freq_energy_ratio"]
    assert 0.2 <= ratios.min() < 0.21
    assert 0.29 < ratios.max() <= 0.3


def test_training_sees_as_much_noise_as_the_shift_asks_for(workspace):
    def sigmas(**changes: object) -> torch.Tensor:
        files = workspace.files({f"model.diffusion.{key}": value for key, value in changes.items()})
        return draw(read_run_config(options().model_copy(update=files)), [(0, i) for i in range(200)])["sigma"]

    plain = sigmas(use_dynamic_shifting=False)
    shifted = sigmas(use_dynamic_shifting=False, training_shift=4)
    torch.testing.assert_close(shifted, 4 * plain / (1 + 3 * plain))
    with pytest.raises(InputError, match="training_shift contradicts use_dynamic_shifting"):
        sigmas(use_dynamic_shifting=True, training_shift=4)


def test_a_still_start_is_one_of_the_network_and_of_no_weights(workspace):
    wide = {"model.predictor.hidden_size": 96, "model.predictor.num_heads": 2}
    config = read_run_config(TrainOptions(**workspace.files(wide), device="cpu", start="still"))
    with join_world("cpu", config.parallel_dims(1), timedelta(minutes=1)) as world:
        (stage,) = build_stages(config, world, weights=True, adapters=None)
    condition = torch.randn(1, 16, 1, 4, 4)
    with torch.no_grad():
        shift = stage.transformer.learnable_proj(condition, 2)
    torch.testing.assert_close(shift, condition.expand(-1, -1, 2, -1, -1))
    trained = workspace.files(wide | {"model.predictor.from_pretrained": str(workspace.base(wide))})
    with pytest.raises(InputError, match=r"--start still has no effect on weights: leave it out, or .*from_pretrained"):
        read_run_config(TrainOptions(**trained, device="cpu", start="still"))


def test_a_batch_is_taken_apart_and_put_together_by_all_its_names():
    batch = {"latents": torch.arange(12.0).view(6, 2), "sigma": torch.arange(6.0)}
    parts = chunk(batch, 3)
    assert [part["sigma"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert all(torch.equal(tensor, batch[name]) for name, tensor in join(parts).items())
    assert to(batch, "meta")["sigma"].is_meta
