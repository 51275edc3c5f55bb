"""From a batch of videos and captions to what the transformer trains on.

B batch, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_data.loader import Batch
from flashi2v_model.encoders import Posterior, encode_text, load_text_encoder, load_vae, video_posterior
from flashi2v_train.config import RunConfig
from flashi2v_train.step import Draws


@dataclass(frozen=True)
class Features:
    """A batch as the transformer's training sees it.

    Attributes:
        latents: (B, C, F, H, W), z.
        condition: (B, C, 1, H, W), the first frame's latent.
        context: (B, L, text_dim), text states with zeroed padding.
    """

    latents: Tensor
    condition: Tensor
    context: Tensor


class Encoders:
    """The frozen VAE and text encoder, with room to remember what they have encoded.

    Clips and captions are encoded one by one, so that a sample's features do not depend on its batch, to the last
    bit, and remembering them changes nothing.

    Args:
        config: of the run.
        device: where to encode.

    Raises:
        InputError: an encoder does not fit the transformer, or cannot be loaded.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config.model
        self.vae = load_vae(config.model.ae, device)
        self.text_encoder = load_text_encoder(config.model.text_encoder, device)
        self._memory: dict[Hashable, tuple[Tensor, ...]] = {}
        self._room = int(config.options.feature_cache_gib * 2**30)
        predictor = config.model.predictor
        for key, ours, theirs in (
            ("in_dim", predictor.in_dim, self.vae.config.z_dim),
            ("text_dim", predictor.text_dim, self.text_encoder.config.d_model),
        ):
            if ours != theirs:
                raise InputError(f"{config.options.mm_model}: predictor.{key} is {ours}, the encoder gives {theirs}")

    @torch.no_grad()
    def __call__(self, batch: Batch, draws: Draws) -> Features:
        """Encode a batch; the posteriors are drawn from with `draws`, or their modes taken (`ae.do_sample`)."""
        sampled = self.config.ae.do_sample
        latents: list[Tensor] = []
        conditions: list[Tensor] = []
        contexts: list[Tensor] = []
        for i, clip in enumerate(zip(batch["path"], batch["first_frame"], batch["flipped"])):
            video = batch["video"][i : i + 1]
            whole = self._remember(clip, partial(self._posterior, video))
            still = self._remember((*clip, "still"), partial(self._posterior, video[:, :, :1]))
            latents.append(Posterior(*whole).draw(draws.posterior[i : i + 1] if sampled else None))
            conditions.append(Posterior(*still).draw(draws.condition_posterior[i : i + 1] if sampled else None))
            contexts += self._remember(batch["caption"][i], partial(self._text, batch, i))
        return Features(torch.cat(latents), torch.cat(conditions), torch.cat(contexts))

    def _posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        posterior = video_posterior(self.vae, video.to(self.vae.device, non_blocking=True))
        return posterior.mean, posterior.std

    def _text(self, batch: Batch, i: int) -> tuple[Tensor]:
        ids = batch["prompt_ids"][i : i + 1].to(self.text_encoder.device, non_blocking=True)
        mask = batch["prompt_mask"][i : i + 1]
        return (encode_text(self.text_encoder, ids, mask, use_mask=self.config.text_encoder.use_attention_mask),)

    def _remember(self, key: Hashable, encode: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what was encoded under a key before, or encode it and keep it on the CPU while there is room."""
        device = self.vae.device
        if key in self._memory:
            return tuple(tensor.to(device, non_blocking=True) for tensor in self._memory[key])
        encoded = encode()
        size = sum(tensor.nbytes for tensor in encoded)
        if size <= self._room:
            self._room -= size
            self._memory[key] = tuple(tensor.cpu() for tensor in encoded)
        return encoded
