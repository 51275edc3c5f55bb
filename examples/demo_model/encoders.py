"""Train the VAE, tokenizer and text encoder of the demo model.

    python examples/demo_model/encoders.py --output demo/encoders

They are the real classes in Wan2.1's directory layout (`vae/`, `tokenizer/`, `text_encoder/`). Stopped anywhere, it
goes on where it was and ends with the same weights.

B batch, T frames, H W pixels, L tokens, D width.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from flashi2v_data.atomic import atomic_directory, atomic_file
from flashi2v_data.randomness import generator
from flashi2v_data.shapes.sentences import DIRECTIONS
from flashi2v_data.shapes.stories import PACES, Stage, sample_story

SEED = 2026
FRAMES = 17
CELL = 8  # pixels of a latent's side
MARGIN = 12  # pixels at the edge of a moved latent's picture that are not known
KL_WEIGHT = 1e-3  # enough that a little noise on a latent changes nothing in the picture
MOVE_WEIGHT = 0.1  # of the difference between moved latents and those of the moved picture
ROUGHNESS = 0.15  # at most, of the latents' deviation: noise that the decoder learns to bear
SAVE_STEPS = 100
COARSEST = ("decoder.conv_in", "decoder.mid_block", "decoder.up_blocks.0.resnets")  # where it sees latents before


@dataclass(frozen=True)
class Phase:
    """Steps at a learning rate that falls to zero.

    Attributes:
        steps: of training.
        learning_rate: of the first of them.
        batch: clips of a step.
        frames: of a clip.
        size: of its frames: square ones, or squares of larger ones in turn.
        moves: of a square's latents, moved by a part of a cell, becomes the square that lies there.
        encoder_too: or else the decoder alone learns.
    """

    steps: int
    learning_rate: float
    batch: int
    frames: int
    size: int = 64
    moves: bool = False
    encoder_too: bool = True


# A latent is the picture of the last frame that it stands for, and moves with it. So single frames teach the encoder
# all that it knows; latents moved by part of a cell teach it that those of a thing elsewhere are its own, elsewhere.
# Then the decoder alone learns: to fill in the three frames between two latents, then to look back further.
PHASES = (
    Phase(3200, 1.5e-3, 8, 1),
    Phase(2600, 1.5e-3, 8, 1, size=96, moves=True),
    Phase(1500, 1.5e-3, 4, 5, size=96, moves=True, encoder_too=False),
    Phase(600, 1e-3, 2, FRAMES, size=96, encoder_too=False),
)


class Film(NamedTuple):
    """A clip to learn of; F32, and of a batch with B in front of all shapes.

    Attributes:
        video: to encode, (3, T, H, W) in [-1, 1].
        moved: right and down, by how many pixels its latents are then moved: (2,).
        wanted: to be decoded, like the video.
        things: where things are in it, (1, T, H, W), 0 or 1. They are few of the pixels, and most of what a caption
            speaks of.
        known: how much of it can be known, (1, 1, H, W), 0 or 1.
    """

    video: Tensor
    moved: Tensor
    wanted: Tensor
    things: Tensor
    known: Tensor


class Films(Dataset[Film]):
    """Clips of stories that no other phase uses, by number."""

    def __init__(self, number: int, phase: Phase) -> None:
        self._number, self._phase = number, phase

    def __getitem__(self, number: int) -> Film:
        index = self._number * 10_000_000 + number
        random = np.random.default_rng(index)
        size, frames = self._phase.size, self._phase.frames
        side = int(random.choice((size, size * 3 // 2)))
        far = CELL if self._phase.moves and side > size else 0
        left, top = random.integers(far, side - size - far, 2, endpoint=True).tolist()
        moved = random.integers(-far, far, 2, endpoint=True).tolist()
        story = sample_story(SEED, index, side, side, looks="seen")
        stage = Stage(story, side, side)
        first = random.integers(0, FRAMES - frames, endpoint=True)
        film = np.stack([stage.frame(moment) for moment in (first + np.arange(frames)) / (FRAMES - 1)])  # (T, H, W, 3)
        backdrop = stage.without(set(range(len(story.things))), 0)

        # What is moved to the right shows what was on the left.
        columns, rows = (slice(at - by, at - by + size) for at, by in zip((left, top), moved))
        things = np.abs(film - backdrop)[:, rows, columns].max(-1) > 8
        known = torch.zeros(1, 1, size, size)
        edge = MARGIN if any(moved) else 0
        known[..., edge : size - edge, edge : size - edge] = 1
        return Film(
            _as_video(film[:, top : top + size, left : left + size]),
            torch.tensor(moved, dtype=torch.float32),
            _as_video(film[:, rows, columns]),
            torch.from_numpy(things)[None].float(),
            known,
        )


def _as_video(film: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(film).permute(3, 0, 1, 2).float() / 127.5 - 1


def load_films(number: int, phase: Phase, first_step: int, workers: int) -> Iterator[Film]:
    """Yield the batches of a phase from a step on."""
    order = range(first_step * phase.batch, phase.steps * phase.batch)
    films = Films(number, phase)
    yield from DataLoader(films, phase.batch, sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available())


@torch.no_grad()
def start_vae() -> AutoencoderKLWan:
    """Random weights, with which nothing but the convolutions that shrink or stretch time sees more than one frame.

    Patches of 2x2 pixels enter as one, so that the costly fine levels of Wan2.1's VAE are not there; the strides are
    its own, (4, 8, 8). Of frames that become one latent the last is taken as it is, and that is never trained: a clip's
    latents are those of every fourth of its frames alone. The decoder's coarsest level sees two latents before, too.
    """
    vae = AutoencoderKLWan(
        base_dim=24, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, attn_scales=[], temperal_downsample=[True, True],
        patch_size=2, in_channels=12, out_channels=12,
    )  # fmt: skip
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        weight = module.weight  # (C_out, C_in, [T,] H, W)
        nn.init.zeros_(weight)
        nn.init.zeros_(module.bias)
        if name.endswith("time_conv"):
            for i in range(weight.shape[0]):
                weight[i, i % weight.shape[1], -1] = 1.0
        else:
            last = weight[:, :, -1] if isinstance(module, nn.Conv3d) else weight
            nn.init.kaiming_normal_(last, nonlinearity="linear")
        module.sees_time = name.startswith(COARSEST)
    return vae


def quick_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """WanRMS_norm's formula in the type of x: on a CPU, a quarter of a step less than by F.normalize."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * norm.gamma.to(x.dtype)


def quick_convolution(convolution: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """WanCausalConv3d's result, by a convolution of frames unless it changes time: of three as one where it sees time,
    else of its last tap alone, as the others are zero."""
    if convolution.kernel_size[1:] == (1, 1) and convolution.kernel_size[0] > 1:
        return plain_convolution(convolution, x, cache_x)
    width, height = convolution._padding[0], convolution._padding[2]
    weight = convolution.weight[:, :, -1]  # (C_out, C_in, H, W)
    if cache_x is not None and convolution.sees_time:
        before = F.pad(torch.cat((cache_x, x), 2), (0, 0, 0, 0, 2 - cache_x.shape[2], 0))
        x = torch.cat([before[:, :, tap : tap + x.shape[2]] for tap in range(3)], 1)
        weight = convolution.weight.transpose(1, 2).flatten(1, 2)  # (C_out, 3 C_in, H, W)
    frames = x.movedim(2, 1).flatten(0, 1)
    frames = F.conv2d(frames, weight, convolution.bias, convolution.stride[1:], (height, width))
    return frames.unflatten(0, (x.shape[0], -1)).movedim(1, 2)


plain_convolution = WanCausalConv3d.forward


def move(latents: Tensor, moved: Tensor) -> Tensor:
    """Move latents (B, C, F, H, W) by pixels, right and down (B, 2), between cells bicubically."""
    height, width = latents.shape[-2:]
    size = CELL * torch.tensor([width, height], device=moved.device)
    back = -2 * moved / size  # (B, 2), where a frame spans -1 to 1
    way = torch.cat((torch.eye(2, device=back.device).expand(len(back), 2, 2), back[..., None]), -1)  # (B, 2, 3)
    frames = latents.float().flatten(1, 2)  # (B, C F, H, W)
    grid = F.affine_grid(way, list(frames.shape), align_corners=False)
    there = F.grid_sample(frames, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return there.unflatten(1, latents.shape[1:3])


def moving_error(vae: AutoencoderKLWan, mean: Tensor, film: Film) -> Tensor:
    """Return by how much latents that were moved differ from those of the picture that lies there.

    Args:
        vae: that encoded the film.
        mean: of the posterior of the whole batch, (B, C, F, H, W).
        film: what was encoded, and what lies there.

    Returns:
        a mean of squares, as a share of the latents' variance.
    """
    far = film.moved.any(1)
    if not far.any():
        return mean.new_zeros(())
    there = vae.encode(film.wanted[far].contiguous(memory_format=torch.channels_last_3d)).latent_dist.mean.float()
    known = (F.avg_pool2d(film.known[far, :, 0], CELL) == 1)[:, :, None]  # (B, 1, 1, H, W)
    squares = (move(mean[far], film.moved[far]) - there).square() / there.detach().var((0, 2, 3, 4), keepdim=True)
    return (squares * known).mean() / known.float().mean()


def reconstruction_error(difference: Tensor, film: Film) -> Tensor:
    """Return L1 and MSE of pixels, and L1 of edges: what makes a star a star.

    Args:
        difference: of two videos, (B, 3, T, H, W).
        film: what was wanted. Things count more, and so do the places that they pass, where they must leave no trail.
    """
    passed = F.max_pool3d(film.things.amax(2, keepdim=True), (1, 7, 7), stride=1, padding=(0, 3, 3))
    weight = (1 + 3 * passed + 7 * film.things) * film.known
    pixels = (weight * (difference.abs() + 2 * difference.square())).sum() / (3 * weight.sum())
    known = difference * film.known
    return pixels + (known.diff(dim=-1).abs().mean() + known.diff(dim=-2).abs().mean()) / film.known.mean()


@dataclass(frozen=True)
class Machine:
    """What the VAE is trained with: a device, its arithmetic, and processes that draw films."""

    device: str
    bf16: bool
    workers: int


def train_phase(vae: AutoencoderKLWan, number: int, phase: Phase, output: Path, machine: Machine) -> None:
    """Train the VAE in place; every 50 steps go into the log, and the state to disk every `SAVE_STEPS`."""
    device = machine.device
    vae.train().to(device)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(phase.encoder_too)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=phase.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    )
    state, first = output / f"vae_phase_{number + 1}.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    films = load_films(number, phase, first, machine.workers)
    steps = tqdm(range(first, phase.steps), f"VAE, phase {number + 1}", phase.steps, initial=first, disable=None)
    for step, batch in zip(steps, films):
        film = Film(*(part.to(device) for part in batch))
        video = film.video.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device, torch.bfloat16, enabled=machine.bf16):
            posterior = vae.encode(video).latent_dist
            random = generator(SEED, "posterior", number, step)
            noise, rough = (torch.randn(posterior.mean.shape, generator=random).to(device) for _ in range(2))
            latents = posterior.mean + posterior.std * noise
            if phase.moves:
                latents = move(latents, film.moved)
            if not phase.encoder_too:  # what samplers make is not exact
                strength = ROUGHNESS * torch.rand(len(video), 1, 1, 1, 1, generator=random).to(device)
                latents = latents + strength * posterior.mean.std() * rough
            decoded = vae.decode(latents).sample
            learns_to_move = phase.moves and phase.encoder_too
            moving = moving_error(vae, posterior.mean, film) if learns_to_move else torch.zeros(())
        difference = decoded.float() - film.wanted
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_error(difference, film) + KL_WEIGHT * divergence + MOVE_WEIGHT * moving
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            squares = (difference * film.known).square().mean() / film.known.mean()
            psnr = -10 * math.log10(squares.item() / 4)
            steps.set_postfix(psnr=f"{psnr:.1f} dB")
            with (output / "vae.csv").open("a") as log:
                log.write(f"{number + 1},{step},{psnr:.2f},{divergence.item():.3f},{moving.item():.3f}\n")
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == phase.steps:
            whole = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            with atomic_file(state) as temporary:
                torch.save({**whole, "step": step + 1}, temporary)


@torch.no_grad()
def set_unit_variance(vae: AutoencoderKLWan, machine: Machine) -> None:
    """Write into the config the mean and standard deviation by which latents are normalised."""
    vae.eval()
    found = []
    for i, film in enumerate(load_films(len(PHASES), Phase(16, 0.0, 8, FRAMES, 96), 0, machine.workers)):
        posterior = vae.encode(film.video.to(machine.device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(SEED, "posterior", len(PHASES), i))
        found.append(posterior.mean.cpu() + posterior.std.cpu() * noise)
    sample = torch.cat(found)  # (B, C, F, h, w)
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def train_vae(output: Path, machine: Machine, shorter: int) -> AutoencoderKLWan:
    """Train all phases, or what is left of them."""
    torch.manual_seed(SEED)
    WanRMS_norm.forward, WanCausalConv3d.forward = quick_norm, quick_convolution
    vae = start_vae()
    log = output / "vae.csv"
    if not log.exists():
        log.write_text("phase,step,psnr_db,kl,moving\n")
    for number, phase in enumerate(PHASES):
        train_phase(vae, number, replace(phase, steps=max(1, phase.steps // shorter)), output, machine)
    set_unit_variance(vae, machine)
    return vae.to("cpu")


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A token for every word of the captions."""
    words = sorted({word for caption in captions for word in caption.replace(",", " , ").split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def train_text(steps: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Train an encoder that tells what a sentence says of the motion, and every word of it.

    As a language model does, it knows all words, those too that the transformer never sees a video of: sentences that
    say the same of a motion get states that say the same.
    """
    torch.manual_seed(SEED)
    batch = 128
    tokenizer = make_tokenizer([sample_story(SEED, i, 64, 64).caption for i in range(20_000)])
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    directions, paces = [*DIRECTIONS, "still", None], [*PACES, None]
    heads = nn.ModuleList(nn.Linear(64, size) for size in (len(directions), len(paces), len(tokenizer)))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    for step in (progress := tqdm(range(steps), "text encoder", disable=None)):
        stories = [
            sample_story(SEED, step * batch + i, 64, 64, words="unseen" if i % 4 == 0 else "all") for i in range(batch)
        ]
        tokens = tokenizer([story.caption for story in stories], padding=True, return_tensors="pt")
        states = encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).last_hidden_state  # (B, L, D)
        mask = tokens.attention_mask.bool()
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
        motions = [story.motion for story in stories]
        direction = torch.tensor([directions.index(motion.direction if motion else "still") for motion in motions])
        pace = torch.tensor([paces.index(motion.pace if motion else None) for motion in motions])
        loss = F.cross_entropy(heads[0](pooled), direction) + F.cross_entropy(heads[1](pooled), pace)
        loss = loss + F.cross_entropy(heads[2](states[mask]), tokens.input_ids[mask])
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
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu, for the VAE (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute the VAE in bf16: quick where the device has it")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw films (default: %(default)s)")
    parser.add_argument("--shorter", type=int, default=1, help="do 1/N of all steps, to try it (default: %(default)s)")
    options = parser.parse_args()

    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "text_encoder").exists():
        tokenizer, encoder = train_text(max(1, 1500 // options.shorter))
        tokenizer.save_pretrained(output / "tokenizer")
        with atomic_directory(output / "text_encoder") as temporary:
            encoder.save_pretrained(temporary)
            halve(temporary / "model.safetensors")
    if not (output / "vae").exists():
        machine = Machine(options.device, options.bf16, options.workers)
        vae = train_vae(output, machine, options.shorter)
        with atomic_directory(output / "vae") as temporary:
            vae.save_pretrained(temporary)
            halve(temporary / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
