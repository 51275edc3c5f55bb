"""The learning rate of a step, against Megatron-LM's definitions."""

import math

import pytest

from flashi2v_train.optim import learning_rate
from flashi2v_train.options import TrainOptions


def rates(steps: int, **changes) -> list[float]:
    options = TrainOptions(mm_model="m.json", mm_data="d.json", lr=1.0, **changes)
    return [learning_rate(step, options) for step in range(steps)]


def test_the_inverse_square_root_starts_from_the_warmup_and_ends_at_the_least():
    found = rates(102, lr_warmup_iters=4, min_lr=0.22, lr_decay_style="inverse-square-root", train_iters=100)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:80] == pytest.approx([2 / math.sqrt(done) for done in range(5, 81)])
    assert found[90:] == [0.22] * 12


@pytest.mark.parametrize(
    ("style", "curve"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: 0.5 * (math.cos(math.pi * share) + 1)),
        ("exponential", lambda share: 2 * 0.5**share - 1),
    ],
)
def test_wsd_warms_up_stays_and_decays(style, curve):
    plan = {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 10, "min_lr": 0.1}
    found = rates(32, lr_warmup_iters=2, train_iters=40, lr_decay_iters=30, **plan)
    assert found[:2] == [0.5, 1.0]
    assert found[2:20] == [1.0] * 18
    assert found[20:30] == pytest.approx([0.1 + 0.9 * curve(done / 10) for done in range(1, 11)])
    assert found[30:] == [0.1, 0.1]


def test_linear_and_cosine_decays_end_at_their_own_step():
    for style in ("linear", "cosine"):
        found = rates(20, lr_decay_style=style, lr_decay_iters=11, train_iters=20)
        assert found[0] == 1.0
        assert found[5] == pytest.approx(0.5)
        assert found[10:] == pytest.approx([0.0] * 10)


def test_the_warmup_may_be_a_share_of_the_decay():
    share = rates(100, lr_decay_style="linear", lr_decay_iters=50, lr_warmup_fraction=0.2, train_iters=100)
    assert share == rates(100, lr_decay_style="linear", lr_decay_iters=50, lr_warmup_iters=10, train_iters=100)
    assert rates(3, lr_warmup_fraction=0.5, train_iters=4) == [0.5, 1.0, 1.0]
