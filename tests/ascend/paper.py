"""What a step costs on NPUs, on paper: operations, bytes and kernels, and the share of the peak that is the ceiling.

python -m flashi2v_npu_ops.testing python tests/ascend/paper.py

The real network runs forward and backward on fake NPU tensors: what is counted are the kernels that torch_npu would be
asked for. A kernel takes at least as long as its operations at the peak, and as its operands at the bandwidth of the
memory; it is assumed that nothing overlaps, and that launching is free.
"""

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.presets import TRANSFORMERS

MACHINES = {"A2": (313e12, 1.6e12), "A3": (560e12, 3.2e12)}  # bf16 operations and bytes a second; A3 has two dies
LATENT = (1, 16, 13, 60, 104)  # 49 frames of 480 x 832


class Count(TorchDispatchMode):
    """Adds up what kernels do."""

    def __init__(self):
        super().__init__()
        self.kernels, self.operations, self.bytes = 0, 0, 0
        self.seconds = dict.fromkeys(MACHINES, 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device.type == "npu"]
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if made and not is_view and not func._opname.startswith(("empty", "detach", "_unsafe_view", "new_empty")):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self._add(operations(func, args, kwargs or {}, out), sum(x.nbytes for x in (*given, *made)))
        return out

    def _add(self, operations, size):
        self.kernels += 1
        self.operations += operations
        self.bytes += size
        for name, (peak, bandwidth) in MACHINES.items():
            self.seconds[name] += max(operations / peak, size / bandwidth)


def operations(func, args, kwargs, out):
    if func._opname.startswith(("npu_fusion_attention", "npu_fused_infer")):
        query, key = args[:2]  # (B, N, K, d): two products forward, five backward
        products = 5 if func._opname.endswith("grad") else 2
        return products * 2 * query.numel() * key.shape[1]
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def step(preset, training):
    with FakeTensorMode(), torch.device("npu"):
        torch.set_default_dtype(torch.bfloat16)  # a module on fake NPUs cannot be converted
        network = FlashI2VTransformer3DModel(**TRANSFORMERS[preset]).requires_grad_(training)
        torch.set_default_dtype(torch.float32)
        given = {
            "hidden_states": torch.randn(LATENT),
            "timestep": torch.tensor([700.0], device="cpu"),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "condition": torch.randn(*LATENT[:2], 1, *LATENT[3:]),
        }
        with Count() as count, torch.set_grad_enabled(training):
            out = network(**given).sample
            if training:
                out.square().mean().backward()
    return count


def main():
    print("| model | step | operations | bytes | kernels | A2: at least, ceiling | A3: at least, ceiling |")
    print("|---|---|---|---|---|---|---|")
    for preset in ("1.3b", "14b"):
        for training in (False, True):
            count = step(preset, training)
            ends = [
                f"{seconds:.2f} s, {count.operations / MACHINES[name][0] / seconds:.0%}"
                for name, seconds in count.seconds.items()
            ]
            kind = "training, one sample" if training else "sampling, one forward pass"
            cells = (f"{count.operations / 1e12:.0f} T", f"{count.bytes / 1e9:.0f} GB", str(count.kernels), *ends)
            print(f"| {preset} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
