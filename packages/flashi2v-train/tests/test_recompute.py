"""Computing again, parking and compiling change what is kept, and no gradient."""

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_npu_ops import attention
from flashi2v_train.offload import HostMemory
from flashi2v_train.options import MemoryOptions
from flashi2v_train.recompute import save_memory

LATENT, LAYERS = (2, 16, 3, 8, 8), 4
CPU = torch.device("cpu")
FULL = {"recompute_granularity": "full"}
BLOCK = {**FULL, "recompute_method": "block"}
UNIFORM = {**FULL, "recompute_method": "uniform"}
SKIP = {"recompute_skip_core_attention": True}
MODES = {
    "all": {**BLOCK, "recompute_num_layers": 4},
    "first two": {**BLOCK, "recompute_num_layers": 2},
    "each": {**UNIFORM, "recompute_num_layers": 1},
    "threes": {**UNIFORM, "recompute_num_layers": 3},
    "selective": {"recompute_granularity": "selective"},
    "skip attention": {**BLOCK, "recompute_num_layers": 0, **SKIP, "recompute_num_layers_skip_core_attention": 4},
    "both": {**BLOCK, "recompute_num_layers": 1, **SKIP, "recompute_num_layers_skip_core_attention": 2},
    "more than there are": {**BLOCK, "recompute_num_layers": 3, **SKIP, "recompute_num_layers_skip_core_attention": 9},
}


def build() -> FlashI2VTransformer3DModel:
    torch.manual_seed(0)
    model = FlashI2VTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        ffn_dim=96,
        freq_dim=32,
        text_dim=24,
        num_layers=LAYERS,
        text_len=8,
    )
    # It starts at zero, and with it the gradients of all before it.
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


class Counted:
    """How often layers attend and compute their MLP, and the bytes that autograd saves."""

    def __init__(self, model: FlashI2VTransformer3DModel) -> None:
        self.attends = self.mlps = self.saved_bytes = 0
        for block in model.blocks:
            block.attn1.attend = self._counting(block.attn1.attend)
            block.ffn.register_forward_hook(self._count_mlp)

    def _counting(self, attend):
        def count(*args):
            self.attends += 1
            return attend(*args)

        return count

    def _count_mlp(self, *_):
        self.mlps += 1


def step(model, counted=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    batch, channels, frames, height, width = LATENT
    seen, bytes_saved = set(), 0

    def pack(tensor):
        nonlocal bytes_saved
        place = tensor.untyped_storage().data_ptr()
        if place not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(place)
            bytes_saved += tensor.untyped_storage().nbytes()
        return tensor

    latents, condition = draw(*LATENT), draw(batch, channels, 1, height, width)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(latents, torch.tensor([500.0, 20.0]), draw(batch, 8, 24), condition).sample
        loss = (output * draw(batch, channels, frames, height, width)).mean()
    if counted is not None:
        counted.saved_bytes = bytes_saved
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def run(options: dict) -> tuple[dict[str, torch.Tensor], Counted]:
    model = build()
    counted = Counted(model)
    save_memory(model, MemoryOptions(**options), offload_attention=False, device=CPU)
    return step(model, counted), counted


@pytest.fixture(scope="module")
def plain():
    return run({})


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_to_the_last_bit(plain, mode):
    gradients, _ = run(MODES[mode])
    assert gradients.keys() == plain[0].keys()
    for name, gradient in plain[0].items():
        torch.testing.assert_close(gradients[name], gradient, atol=0, rtol=0, msg=name)


def test_memory_falls_with_what_is_computed_again(plain):
    saved = {mode: run(options)[1].saved_bytes for mode, options in MODES.items()}
    none = plain[1].saved_bytes
    assert saved["all"] < saved["first two"] < none
    assert saved["all"] < 0.3 * none
    assert saved["each"] == saved["all"]
    assert saved["threes"] < saved["each"]
    assert saved["selective"] < none


@pytest.mark.parametrize(
    ("mode", "attends", "mlps"),
    [("all", 8, 8), ("first two", 6, 6), ("threes", 8, 8), ("selective", 8, 4), ("both", 7, 7)],
)
def test_what_is_computed_twice(mode, attends, mlps):
    """The function that attends is called again where layers are; its operator is not, see below."""
    _, counted = run(MODES[mode])
    assert (counted.attends, counted.mlps) == (attends, mlps)


def test_skipped_attention_is_computed_once():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = str(operator)
            self.count += "scaled_dot_product" in name and "backward" not in name
            return operator(*args, **(kwargs or {}))

    for mode, times in (("skip attention", 1), ("all", 2)):
        model = build()
        save_memory(model, MemoryOptions(**MODES[mode]), offload_attention=False, device=CPU)
        with Operators() as operators:
            step(model)
        assert operators.count == times * 2 * LAYERS  # self and cross attention


@pytest.mark.parametrize("others", [{}, {"recompute_granularity": "selective"}, MODES["each"]])
def test_skipping_attention_belongs_to_recomputing_the_first_layers(others):
    with pytest.raises(ValueError, match="goes with --recompute-granularity full and --recompute-method block"):
        MemoryOptions(**others, **SKIP, recompute_num_layers_skip_core_attention=2)


def test_names_of_parameters_stay():
    model, changed = build(), build()
    save_memory(changed, MemoryOptions(**MODES["both"], compile=True), offload_attention=False, device=CPU)
    assert [*dict(changed.named_parameters())] == [*dict(model.named_parameters())]
    assert [*changed.state_dict()] == [*model.state_dict()]


def test_parked_tensors_come_back_as_they_were(plain):
    """The bookkeeping of the host's memory, with plain copies in place of streams."""
    model = build()
    memory, parked = HostMemory(CPU, min_bytes=1), []
    for block in model.blocks:

        def attend(*args, inner=block.attn1.attend):
            parked.append(1)
            return memory.run(inner, *args)

        block.attn1.attend = attend
    gradients = step(model)
    assert len(parked) == LAYERS
    for name, gradient in plain[0].items():
        torch.testing.assert_close(gradients[name], gradient, atol=0, rtol=0, msg=name)


def test_a_place_in_memory_that_is_used_again_is_another_tensor():
    """The reference attention saves intermediate results that are freed before the next ones are made."""
    query, key, value = (torch.randn(2, 64, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    reference = functools.partial(attention, backend="reference")
    parking = functools.partial(HostMemory(CPU, min_bytes=1).run, reference)
    gradients = [
        torch.autograd.grad(attend(query, key, value).float().square().sum(), (query, key, value))
        for attend in (reference, parking)
    ]
    for plain, parked in zip(*gradients):
        assert torch.equal(plain, parked)


def test_parking_on_the_cpu_is_said_to_be_without_effect(caplog):
    caplog.set_level("INFO")
    model = build()
    before = [block.attn1.attend for block in model.blocks]
    save_memory(model, MemoryOptions(), offload_attention=True, device=CPU)
    assert [block.attn1.attend for block in model.blocks] == before
    assert "attention_async_offload has no effect on the CPU" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MODES["all"], MODES["skip attention"]], ids=["plain", "all", "skip attention"])
def test_compiled_blocks_compute_the_same(plain, options):
    gradients, _ = run({**options, "compile": True})
    for name, gradient in plain[0].items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
