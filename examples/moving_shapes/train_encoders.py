"""Train the small VAE, tokenizer and text encoder of the moving-shapes model.

    python examples/moving_shapes/train_encoders.py --output demo/encoders --bf16

They are the real classes in Wan2.1's directory layout (`vae/`, `tokenizer/`, `text_encoder/`). Trained ones come with
flashi2v-infer, so nothing here is needed to run the example. A run that was stopped goes on after the last phase of
the VAE that it finished.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from tqdm import trange
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from flashi2v_data.randomness import generator
from flashi2v_data.shapes.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, DISTANCES, RADII, SHAPES, render, sample_scene

SEED = 2026
SIZE, FRAMES = 64, 17
KL_WEIGHT = 1e-3  # enough that a little noise on a latent changes nothing in the picture


@dataclass(frozen=True)
class Phase:
    """Steps at a learning rate that falls to zero, on clips of (batch, frames)."""

    steps: int
    learning_rate: float
    batch: int
    frames: int


# Single frames teach space, cheaply. What they teach holds for every frame of a clip, as `start_vae` sees to it that no
# frame looks at those before it at first; whole clips then teach motion.
PHASES = (Phase(3000, 1.5e-3, 8, 1), Phase(2000, 1e-3, 2, FRAMES))


def render_batch(phase: int, step: int, batch: int, frames: int) -> Tensor:
    """Scenes that no other step uses: (B, 3, T, H, W) in [-1, 1]."""
    numbers = range((phase * 100_000 + step) * 16, (phase * 100_000 + step) * 16 + batch)
    scenes = [sample_scene(SEED, number, seconds=FRAMES / 16, pairs="seen") for number in numbers]
    video = torch.stack([torch.from_numpy(render(scene, frames, SIZE, SIZE, 16)) for scene in scenes])
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def start_vae() -> AutoencoderKLWan:
    """Random weights, with which every frame is treated as a picture of its own."""
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, attn_scales=[])
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        weight = module.weight  # (C_out, C_in, [T,] H, W)
        nn.init.zeros_(weight)
        nn.init.zeros_(module.bias)
        if name.endswith("time_conv"):  # copies the last frame to where it shrinks or stretches time
            for i in range(weight.shape[0]):
                weight[i, i % weight.shape[1], -1] = 1.0
        else:
            last = weight[:, :, -1] if isinstance(module, nn.Conv3d) else weight
            nn.init.kaiming_normal_(last, nonlinearity="linear")
    return vae


def quick_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """WanRMS_norm's formula in the type of x: on a CPU, a quarter of a step less than by F.normalize."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * norm.gamma.to(x.dtype)


def train_phase(vae: AutoencoderKLWan, number: int, log: Path, device: str, bf16: bool) -> None:
    """L1 + MSE reconstruction with a light KL term; every 50 steps go into the log."""
    phase = PHASES[number]
    vae.train().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=phase.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    )
    progress = trange(phase.steps, desc=f"vae, phase {number + 1} of {len(PHASES)}", disable=None)
    for step in progress:
        video = render_batch(number, step, phase.batch, phase.frames).to(device)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            posterior = vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator(SEED, "posterior", number, step)).to(device)
            reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        difference = reconstruction.float() - video
        # Most pixels are background, which alone would hold the gradient for hundreds of steps: what counts more is
        # the shape, and all that it passes over, where it must leave no trail.
        background = video.flatten(2).median(-1).values[..., None, None, None]
        shape = ((video - background).abs() > 0.05).amax(1, keepdim=True).float()  # (B, 1, T, H, W)
        passed = F.max_pool2d(shape.amax(2), 7, stride=1, padding=3)[:, :, None]  # (B, 1, 1, H, W)
        weight = 1 + 3 * passed + 7 * shape
        error = (weight * (difference.abs() + 2 * difference.square())).sum() / (3 * weight.sum())
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        (error + KL_WEIGHT * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            psnr = -10 * math.log10(difference.square().mean().item() / 4)
            progress.set_postfix(psnr=f"{psnr:.1f} dB")
            with log.open("a") as lines:
                lines.write(f"{number + 1},{step},{psnr:.2f},{divergence.item():.3f}\n")


@torch.no_grad()
def set_unit_variance(vae: AutoencoderKLWan) -> None:
    """Write into the config the mean and standard deviation by which latents are normalized."""
    vae.eval().to("cpu")
    latents = []
    for i in range(16):
        posterior = vae.encode(render_batch(len(PHASES), i, 8, FRAMES)).latent_dist
        latents.append(posterior.sample(generator(SEED, "posterior", len(PHASES), i)))
    sample = torch.cat(latents)  # (B, C, T, H, W)
    vae.register_to_config(
        latents_mean=sample.mean((0, 2, 3, 4)).tolist(), latents_std=sample.std((0, 2, 3, 4)).tolist()
    )


def train_vae(output: Path, device: str, bf16: bool) -> AutoencoderKLWan:
    """Train all phases, or those that are left; what each gave is kept."""
    torch.manual_seed(SEED)
    WanRMS_norm.forward = quick_norm
    finished = [directory for i in range(len(PHASES)) if (directory := output / f"vae_after_phase_{i + 1}").exists()]
    vae = AutoencoderKLWan.from_pretrained(finished[-1]) if finished else start_vae()
    log = output / "vae.csv"
    if not finished:
        log.write_text("phase,step,psnr_db,kl\n")
    for number in range(len(finished), len(PHASES)):
        train_phase(vae, number, log, device, bf16)
        vae.save_pretrained(output / f"vae_after_phase_{number + 1}")
    set_unit_variance(vae)
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
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the VAE (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute the VAE in bf16: quick where the device has it")
    options = parser.parse_args()

    if not (options.output / "text_encoder").exists():
        tokenizer, encoder = train_text(options.text_steps)
        tokenizer.save_pretrained(options.output / "tokenizer")
        encoder.save_pretrained(options.output / "text_encoder")
        halve(options.output / "text_encoder" / "model.safetensors")
    options.output.mkdir(parents=True, exist_ok=True)
    vae = train_vae(options.output, options.device, options.bf16)
    vae.save_pretrained(options.output / "vae")
    halve(options.output / "vae" / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
