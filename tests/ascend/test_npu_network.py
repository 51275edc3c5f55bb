"""The network on an NPU that is made of CPU: what it asks for, and that what Ascend refuses does not pass unseen."""

import os
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from npu_runs import EMULATED, torchrun
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from flashi2v_model import FlashI2VTransformer3DModel, layers, transformer
from flashi2v_model.encoders import encode_text
from flashi2v_npu_ops import route_conv3d
from flashi2v_npu_ops.testing import RefusedError
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.world import DisagreementError, join_world

only_emulated = pytest.mark.skipif(not EMULATED, reason="on an NPU such a program may hang, or compute nonsense")

TINY = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16}
TINY |= {"num_layers": 2, "in_channels": 16, "out_channels": 16}
# What the numbers of an NPU may differ by from those of the CPU.
CLOSE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-4} if EMULATED else {"atol": 2e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 5e-2, "rtol": 5e-2},
}
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Notes what brings numbers of the device to the host, and what is neither fp32 nor half on it."""

    def __init__(self):
        super().__init__()
        self.reads, self.strange = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in (args, out))
        leaves = any(x.device.type == "npu" for x in given) and any(x.device.type == "cpu" for x in made)
        if func._opname in READS or leaves:
            self.reads.append(str(func))
        self.strange += [
            str(func) for x in made if x.device.type == "npu" and (x.dtype == torch.float64 or x.is_complex())
        ]
        return out


def make(dtype=torch.float32, device="npu"):
    torch.manual_seed(0)
    network = FlashI2VTransformer3DModel(**TINY)
    with torch.no_grad():
        for parameter in network.parameters():  # none starts at zero, so that all of them count
            parameter.copy_(torch.randn_like(parameter) / 10)
    return network.to(device, dtype)


def arguments(device="npu"):
    numbers = torch.Generator().manual_seed(1)
    parts = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=numbers),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=numbers),
        "condition": torch.randn(1, 16, 1, 8, 8, generator=numbers),
    }
    return {name: part.to(device) for name, part in parts.items()} | {"timestep": torch.tensor([700.0])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_pass_reads_nothing_from_the_device_and_is_the_cpus(dtype):
    expected = make(dtype, "cpu")(**arguments("cpu")).sample
    network, given = make(dtype), arguments()
    network(**given)  # makes the tables that are kept
    with Watch() as watch:
        out = network(**given).sample
        out.square().mean().backward()
    assert watch.reads == watch.strange == []
    torch.testing.assert_close(out.cpu(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_encodes_and_decodes_as_on_the_cpu(dtype):
    """With its causal cache: of nine frames the first is coded alone, then four at a time."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1).requires_grad_(False).eval()
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = vae.encode(video).latent_dist.mode()
    decoded = vae.decode(expected).sample
    route_conv3d(vae)
    vae.to("npu", dtype)
    given = video.to("npu", dtype), expected.to("npu", dtype)
    with Watch() as watch:
        found = vae.encode(given[0]).latent_dist.mode(), vae.decode(given[1]).sample
    assert watch.reads == watch.strange == []
    for ours, theirs in zip(found, (expected, decoded), strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_encoder_encodes_as_on_the_cpu(dtype):
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(config).requires_grad_(False).eval()
    tokens = torch.arange(12).view(1, 12) % 64
    mask = (torch.arange(12) < 9).long()[None]
    expected = encode_text(encoder, tokens, mask)
    encoder.to("npu", dtype)
    given = tokens.to("npu"), mask.to("npu")
    with Watch() as watch:
        found = encode_text(encoder, *given)
    assert watch.reads == watch.strange == []
    torch.testing.assert_close(found.float().cpu(), expected, **CLOSE[dtype])


def fp64_tables(monkeypatch):
    whole = layers.rope_tables

    def exact(grid, head_dim, device):
        return tuple(part.double().to(device) for part in whole(grid, head_dim, torch.device("cpu")))

    monkeypatch.setattr(transformer, "rope_tables", exact)


def a_device_named_for_cuda(monkeypatch):
    whole = layers.LatentShift.forward
    monkeypatch.setattr(layers.LatentShift, "forward", lambda self, x, num: whole(self, x.cuda(), num))


def bf16_convolutions_in_three_dimensions(monkeypatch):
    monkeypatch.setattr(transformer, "route_conv3d", lambda module: None)


def complex_numbers(monkeypatch):
    whole = transformer.split_frequencies
    monkeypatch.setattr(
        transformer,
        "split_frequencies",
        lambda x, *rest, **more: whole(torch.fft.ifft2(torch.fft.fft2(x)).real, *rest, **more),
    )


BREAKS = {
    fp64_tables: (RefusedError, "float64"),
    a_device_named_for_cuda: (AssertionError, "CUDA"),
    bf16_convolutions_in_three_dimensions: (RefusedError, "Conv3d in bf16"),
    complex_numbers: (RefusedError, "complex"),
}


@only_emulated
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_copy_fails(broken, monkeypatch):
    broken(monkeypatch)
    error, words = BREAKS[broken]
    with pytest.raises(error, match=words):
        make(torch.bfloat16)(**arguments())


def join(rank, directory, size=2):
    torch.npu.set_device(rank)
    store = dist.FileStore(f"{directory}/store", size)
    dist.init_process_group("cpu:gloo,npu:hccl", store=store, rank=rank, world_size=size)


def reduces_another_dtype(rank, directory):
    join(rank, directory)
    number = torch.ones(1, device="npu", dtype=torch.int32 if rank else torch.float32)
    with pytest.raises(RuntimeError, match="all ranks must do the same"):
        dist.all_reduce(number)
    os._exit(0)  # whose processes are no longer in step


def waits_for_nobody(rank, directory):
    os.environ["HCCL_EXEC_TIMEOUT"] = "1"
    join(rank, directory)
    if rank == 0:
        with pytest.raises(RuntimeError, match="rank 1 did not take part within HCCL_EXEC_TIMEOUT"):
            dist.all_reduce(torch.ones(1, device="npu"))
        Path(directory, "done").touch()
    while not Path(directory, "done").exists():
        time.sleep(0.05)
    os._exit(0)


def casts_what_is_sharded(rank, directory):
    """What torch_npu 2.6 cannot do, and 2.13 can; no code of ours does it."""
    join(rank, directory)
    network = make()
    fully_shard(network, mesh=init_device_mesh("npu", (2,)))
    with pytest.raises(RuntimeError, match="a cast of a sharded tensor"):
        network.to(torch.bfloat16)
    dist.destroy_process_group()


def sums_of_a_run(rank, environments):
    """Processes compare what they are about to reduce, before any of them waits for the others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environments[rank].items():
            patch.setenv(name, value)
        with join_world("npu", ParallelDims(1, 1, 1, 2, 1, (2,))) as world:
            assert world.sum(torch.full((2,), rank + 1.0, device="npu")).tolist() == [3.0, 3.0]
            number = torch.ones(1, device="npu", dtype=torch.int32 if rank else torch.float32)
            with pytest.raises(DisagreementError, match=r"process 0 float32 \(1,\), process 1 int32 \(1,\)"):
                world.sum(number)
            assert dist.get_backend(world.control) == "gloo"
            assert dist.get_backend_config() == "cpu:gloo,npu:hccl"
            both = [torch.ones(1), torch.ones(1, device="npu")]
            for tensor in both:
                dist.all_reduce(tensor)
                assert tensor.item() == 2


@only_emulated
@pytest.mark.parametrize("broken", [reduces_another_dtype, waits_for_nobody])
def test_what_two_processes_may_do_and_what_they_are_told(broken, tmp_path):
    forked.call("flashi2v-train", 2, broken, str(tmp_path))


@only_emulated
def test_a_run_refuses_to_reduce_an_int_on_one_rank_and_a_float_on_another():
    forked.call("flashi2v-train", 2, sums_of_a_run, torchrun(2))


@pytest.mark.skipif(os.environ.get("STUB_CANN_OLDER") != "1", reason="torch_npu 2.13 casts what is sharded")
def test_a_cast_of_sharded_weights_fails_as_under_an_older_torch_npu(tmp_path):
    forked.call("flashi2v-train", 2, casts_what_is_sharded, str(tmp_path))
