"""Runs the stages of sampling under an offloading, on a pretended accelerator: tensors without numbers that have a
device, and refuse to meet those of another.

    python pretended_card.py model|group

Prints, as JSON, how many bytes of each part's weights are on the card within modules and at the end of stages.
"""

import json
import sys
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

import flashi2v_infer.decoding
from flashi2v_infer.decoding import decode_within_memory
from flashi2v_infer.execution import Execution
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.placement import place
from flashi2v_model import FlashI2VTransformer3DModel, presets
from flashi2v_model.encoders import encode_text, encode_video
from flashi2v_model.scheduler import euler_scheduler

_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card:0")


def move(self: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
    """Stand in for `Module._apply`, which swaps such tensors instead of setting their data, and cannot."""
    for module in self.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.data = convert(tensor.data)
    return self


class Follow(TorchFunctionMode):
    """Lets `tensor.data = other` take over the device, and makes tensors of numbers on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.data.__set__:
            args[0].fake_device = args[1].fake_device
            return None
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def main(offload: str) -> None:
    torch.nn.Module._apply = move
    scheduler = euler_scheduler(7.0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Follow():
        transformer = FlashI2VTransformer3DModel(**presets.TRANSFORMERS["tiny"])
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        sizes = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        encoder = UMT5EncoderModel(
            UMT5Config(**sizes, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
        )
        pipe = FlashI2VPipeline(ByT5Tokenizer(extra_ids=0), encoder, vae, transformer, scheduler)
        execution = Execution(device="cuda", offload=offload)
        place(pipe, execution, CARD)
        assert pipe._execution_device == CARD

        seen = {}

        def look(stage: str) -> None:
            modules = {
                "blocks": transformer.blocks,
                "ends": transformer.proj_out,
                "shift": transformer.learnable_proj,
                "text encoder": encoder,
                "VAE": vae,
            }
            on_card = {
                name: sum(p.numel() * p.element_size() for p in module.parameters() if p.device == CARD)
                for name, module in modules.items()
            }
            seen.setdefault(stage, on_card)

        flashi2v_infer.decoding.free_memory = lambda device: look("as the free memory is asked for")
        encoder.encoder.block[0].register_forward_pre_hook(lambda *_: look("in the text encoder"))
        # Convolutions of such tensors look at no device, so that of their weights is looked at here.
        transformer.learnable_proj.proj[0].register_forward_pre_hook(lambda *_: look("in the latent shift"))
        vae.decoder.conv_in.register_forward_pre_hook(lambda *_: look("in the decoder"))
        transformer.blocks[2].attn1.register_forward_pre_hook(lambda *_: look("in a block"))
        for _ in range(2):  # the second video starts from where the first has left the parts
            ids = torch.zeros(1, 24, dtype=torch.long, device=CARD)
            text = encode_text(encoder, ids, torch.ones_like(ids), use_mask=False)
            condition = encode_video(vae, torch.zeros(1, 3, 1, 32, 48, device=CARD))
            look("after the image")
            y = torch.zeros(1, 16, 3, 4, 6, device=CARD)
            for _ in range(2):
                y = transformer(y, torch.full((1,), 5.0), text, condition)[0]
            video, _ = decode_within_memory(vae, y, execution)
            look("after decoding")
            assert {t.device for t in (text, condition, y, video)} == {CARD}
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
