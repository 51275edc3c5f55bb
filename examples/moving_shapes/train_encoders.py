"""Train the small VAE, tokenizer and text encoder that the moving-shapes example uses.

    python examples/moving_shapes/train_encoders.py --output examples/moving_shapes/weights --steps 4000

They are the real classes in Wan2.1's directory layout (`vae/`, `tokenizer/`, `text_encoder/`), small enough to live in
the repository. Nothing here is needed to run the example: its weights are checked in. About 45 minutes on 2 CPU cores.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from tqdm import trange
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from flashi2v_data.randomness import generator
from flashi2v_data.shapes import BACKGROUNDS, COLOURS, DIRECTIONS, DISTANCES, RADII, SHAPES, render, sample_scene

SEED = 2026
SIZE = 64
# The VAE is causal in time, so single frames teach it space and short clips teach it motion, both cheaply.
CLIPS = ((16, 1), (3, 17), (8, 5), (3, 17))  # (batch, frames), taken in turn


def render_batch(step: int, batch: int, frames: int) -> Tensor:
    """Scenes that no other step uses: (B, 3, T, H, W) in [-1, 1]."""
    clips = [render(sample_scene(SEED, step * 64 + i, seconds=17 / 16), frames, SIZE, SIZE, 16) for i in range(batch)]
    video = torch.stack([torch.from_numpy(clip) for clip in clips])  # (B, T, H, W, 3)
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(steps: int, start: Path | None) -> AutoencoderKLWan:
    """L1 + MSE reconstruction with a light KL term; the config's mean and std then give latents unit variance."""
    torch.manual_seed(SEED)
    if start is not None:
        vae = AutoencoderKLWan.from_pretrained(start)
    else:
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, attn_scales=[])
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):  # torch's own start values fade out over this depth
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3 if start is None else 1.5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    progress = trange(steps, desc="vae", disable=None)
    for step, (batch, frames) in zip(progress, itertools.cycle(CLIPS)):
        video = render_batch(step, batch, frames)
        posterior = vae.encode(video).latent_dist
        reconstruction = vae.decode(posterior.sample(generator(SEED, "posterior", 0, step))).sample
        difference = reconstruction - video
        # Most pixels are background, which alone would hold the gradient for hundreds of steps: what counts more is
        # the shape, and all that it passes over, where it must leave no trail.
        background = video.flatten(2).median(-1).values[..., None, None, None]
        shape = ((video - background).abs() > 0.05).amax(1, keepdim=True).float()  # (B, 1, T, H, W)
        passed = F.max_pool2d(shape.amax(2), 7, stride=1, padding=3)[:, :, None]  # (B, 1, 1, H, W)
        weight = 1 + 3 * passed + 7 * shape
        error = (weight * (difference.abs() + 2 * difference.square())).sum() / (3 * weight.sum())
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        (error + 1e-5 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            psnr = -10 * math.log10(difference.square().mean().item() / 4)
            progress.write(f"step {step}: {frames} frames, PSNR {psnr:.1f} dB, KL {divergence.item():.2f}")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(render_batch(steps + i, 8, 17)).latent_dist.mode() for i in range(16)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    return vae


def train_text(steps: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """A word-level tokenizer, and an encoder trained to tell every attribute of the caption."""
    torch.manual_seed(SEED)
    captions = [sample_scene(SEED, i).caption for i in range(5000)]
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    attributes = (SHAPES, COLOURS, RADII, BACKGROUNDS, DIRECTIONS, DISTANCES)
    heads = nn.ModuleList(nn.Linear(64, len(attribute)) for attribute in attributes)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    for step in (progress := trange(steps, desc="text encoder", disable=None)):
        scenes = [sample_scene(SEED, step * 128 + i) for i in range(128)]
        tokens = tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt")
        states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        weights = tokens.attention_mask[..., None].float()
        pooled = (states * weights).sum(1) / weights.sum(1)  # (B, D)
        truths = [(s.shape, s.colour, s.size, s.background, s.direction, s.pace) for s in scenes]
        loss = pooled.new_zeros(())
        for i, (head, attribute) in enumerate(zip(heads, attributes)):
            target = torch.tensor([list(attribute).index(truth[i]) for truth in truths])
            # A caption of a still shape names no pace, so there is none to tell.
            told = torch.tensor([i < 5 or truth[4] != "still" for truth in truths])
            loss = loss + F.cross_entropy(head(pooled)[told], target[told])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return tokenizer, encoder.eval()


def halve(path: Path) -> None:
    """Store weights as fp16: they are loaded into fp32 modules."""
    save_file({key: value.half() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the VAE")
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--start", type=Path, help="go on from this VAE, and leave the text encoder as it is")
    options = parser.parse_args()

    if options.start is None:
        tokenizer, encoder = train_text(options.text_steps)
        tokenizer.save_pretrained(options.output / "tokenizer")
        encoder.save_pretrained(options.output / "text_encoder")
        halve(options.output / "text_encoder" / "model.safetensors")
    vae = train_vae(options.steps, options.start)
    vae.save_pretrained(options.output / "vae")
    halve(options.output / "vae" / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
