"""Which 8-bit numbers a device is given; what they compute is tested where torchao is (`nox -s quantized`)."""

import pytest
import torch

from flashi2v_model import InputError
from flashi2v_model.quantization import check_products

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "device", "capability", "dtype", "words"),
    [
        ("int8", "xpu", None, BF16, None),
        ("fp8", "cuda", (7, 0), BF16, None),
        ("int8_dynamic", "cpu", None, torch.float32, None),
        ("int8_dynamic", "cuda", (8, 0), BF16, None),
        ("int8_dynamic", "cuda", (7, 5), BF16, "needs compute capability 8.0, this GPU has 7.5: int8 stores in 8 bits"),
        ("int8_dynamic", "xpu", None, BF16, "needs a GPU of compute capability 8.0, not xpu: int8 stores"),
        ("fp8_dynamic", "cuda", (8, 9), BF16, None),
        ("fp8_dynamic", "cuda", (8, 6), BF16, "needs compute capability 8.9, this GPU has 8.6: fp8 stores"),
        ("fp8_dynamic", "cuda", (9, 0), torch.float32, "needs a model in bf16, this is in torch.float32"),
        ("fp8_dynamic", "cpu", None, BF16, "needs a GPU of compute capability 8.9, not cpu"),
    ],
)
def test_products_of_8_bits_are_refused_where_a_device_has_none(monkeypatch, kind, device, capability, dtype, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if words is None:
        check_products(kind, torch.device(device), dtype)
    else:
        with pytest.raises(InputError, match=words):
            check_products(kind, torch.device(device), dtype)


def test_for_a_card_of_another_machine_nothing_is_refused_but_another_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_products("fp8_dynamic", torch.device("cuda"), BF16)
    with pytest.raises(InputError, match="bf16"):
        check_products("fp8_dynamic", torch.device("cuda"), torch.float16)
