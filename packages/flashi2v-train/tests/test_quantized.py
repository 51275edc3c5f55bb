"""Matrices of 8 bits under adapters: torchao's numbers, gradients through them, and the memory that is planned."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from flashi2v_model.cost import kept_bytes
from flashi2v_model.quantization import quantize
from flashi2v_train.config import TrainOptions, read_run_config
from flashi2v_train.cost import build_stage, predict
from flashi2v_train.lora import plan_adapters
from flashi2v_train.parallelise import build_stages
from flashi2v_train.quantized import FrozenLinear, freeze_in_8_bits
from flashi2v_train.world import join_world


def test_numbers_are_those_of_sampling_and_gradients_those_of_the_rounded_matrix():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 16, bias=False)).requires_grad_(False)
    sampled, rounded = copy.deepcopy(part), copy.deepcopy(part)
    quantize(sampled, "int8")
    for layer, ours in ((0, sampled[0]), (2, sampled[2])):
        rounded[layer].weight.data = ours.weight.dequantize()
    freeze_in_8_bits(part)
    assert [type(layer) for layer in part] == [FrozenLinear, nn.SiLU, FrozenLinear]
    x = torch.randn(2, 5, 48, requires_grad=True)
    torch.testing.assert_close(part(x), sampled(x), atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(part(x).square().sum(), x)
    (expected,) = torch.autograd.grad(rounded(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert kept_bytes(lambda: part(x), part) == 2 * 5 * 64 * 4  # the activation's input, and no matrix


def test_the_plan_counts_what_is_held(workspace):
    files = workspace.files({"model.predictor.from_pretrained": str(workspace.base())})
    config = read_run_config(TrainOptions(**files, device="cpu", lora_rank=4, lora_quantize="int8"))
    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = build_stages(config, world, weights=True, adapters=plan_adapters(config))
    planned = build_stage(config, config.parallel_dims(1), 0)
    held = {name: (p.shape, p.dtype) for name, p in stage.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in planned.named_parameters()} == held
    memory = predict(config, config.parallel_dims(1))[0].memory
    assert memory.weights == sum(p.nbytes for p in stage.parameters())
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    assert (memory.gradients, memory.optimizer, memory.average) == (4 * trained, 8 * trained, 4 * trained)
    assert memory.gathered == 4 * 48 * 64  # of the largest matrix
