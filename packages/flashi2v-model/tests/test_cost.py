from dataclasses import replace

import torch

from flashi2v_model import FlashI2VTransformer3DModel, presets
from flashi2v_model.caching import conditions_kept
from flashi2v_model.cost import count_operations, kept_bytes, tracing
from flashi2v_model.sampling import VelocityField
from flashi2v_model.transformer import EMBED_INPUTS
from flashi2v_npu_ops import attention


def test_operations_of_the_released_model_follow_the_textbook():
    width, ffn, layers, tokens, text = 1536, 8960, 30, 13 * 30 * 52, 512
    with torch.device("meta"):
        transformer = FlashI2VTransformer3DModel(**presets.TRANSFORMERS["1.3b"])
    latents = torch.empty(1, 16, 13, 60, 104, device="meta")
    context = torch.empty(1, text, 4096, device="meta")
    velocity = VelocityField(transformer, latents[:, :, :1], context, None, 1.0, 0.1, cfg_batch=False)
    with conditions_kept(transformer), tracing() as trace:
        velocity(latents, torch.tensor(900.0, device="meta"))
        first = trace.flops
        velocity(latents, torch.tensor(100.0, device="meta"))
    inputs = {
        "hidden_states": latents,
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": context,
        "condition": latents[:, :, :1],
        "low_freq_energy_ratio": torch.empty(1, device="meta"),
    }
    operations = count_operations(transformer, inputs)
    # Two for each weight and token.
    projections = 2 * tokens * (6 * width**2 + 2 * width * ffn)
    attending = 4 * tokens * width * (tokens + text)
    ends = 2 * tokens * (64 * width + 64 * width)  # patches of the latent, and 64 numbers a patch
    features = 2 * (tokens // 13) * (64 * width + width**2)  # patches of one frame, a 1x1x1 convolution
    time = 2 * (256 * width + width**2 + 6 * width**2)
    shift = 2 * 13 * 60 * 104 * 27 * (16 * 64 + 64 * 16)
    step = layers * (projections + attending) + ends + time
    assert trace.flops - first == step
    # The first step's own: the first frame, the text, and its keys and values.
    keys_values = layers * 2 * text * 2 * width**2
    assert first - step == keys_values + 2 * text * (4096 * width + width**2) + features + shift
    assert trace.peak < 3 * 2**30  # a matrix of all pairs of tokens would take 18 GiB a layer
    assert operations.forward == first
    assert operations.attention == attending
    assert operations.matrices == projections + 2 * text * 2 * width**2
    assert operations.head == 2 * tokens * 64 * width
    assert operations.training == 3 * first


def test_autograd_keeps_of_attention_what_flash_attention_keeps():
    query, key, value = (torch.empty(2, n, 4, 8, device="meta", requires_grad=True) for n in (6, 5, 5))
    inputs, output, sums = 2 * (6 + 5 + 5) * 4 * 8 * 4, 2 * 6 * 4 * 8 * 4, 2 * 6 * 4 * 4
    assert kept_bytes(lambda: attention(query, key, value), torch.nn.Identity()) == inputs + output + sums


def test_weights_are_not_what_autograd_keeps():
    layer = torch.nn.Linear(8, 4, device="meta")
    x = torch.empty(3, 8, device="meta")
    assert kept_bytes(lambda: layer(x), layer) == 3 * 8 * 4


class Scored(FlashI2VTransformer3DModel):
    """A variant as a user may write it: what is usual by position, what is its own by name."""

    def embed(self, *usual, score):
        x, *rest = super().embed(*usual)
        return x + score[:, None, None], *rest


def test_a_variant_is_counted_with_what_it_asks_for():
    with torch.device("meta"):
        plain, scored = (cls(**presets.TRANSFORMERS["tiny"]) for cls in (FlashI2VTransformer3DModel, Scored))
        latents, text, one = torch.empty(1, 16, 3, 8, 8), torch.empty(1, 16, 64), torch.empty(1)
    inputs = dict(zip(EMBED_INPUTS, (latents, one, text, latents[:, :, :1], one)))
    found, expected = count_operations(scored, {"score": one, **inputs}), count_operations(plain, inputs)
    assert found.moved[0] > expected.moved[0]  # the score is added
    assert replace(found, moved=expected.moved) == expected


def test_what_operators_without_operations_move_is_counted_and_views_move_nothing():
    x = torch.zeros(4, 8)
    with tracing() as trace:
        y = x + 1
        y.view(32).unflatten(0, (8, 4))
        y @ y.T
    assert trace.moved == 2 * x.nbytes
