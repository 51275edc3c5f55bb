"""What the transformer trains on: latents of clips and states of captions, encoded on the fly or read from a store.

B batch, C latent channels, F latent frames, H W latent grid, L text tokens, T video frames.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_data.loading.composer import ComposedSampler
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import Batch as LoadedBatch
from flashi2v_data.loading.loader import StatefulLoader, build_dataloader
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.randomness import generator
from flashi2v_data.store.reader import open_store
from flashi2v_model.encoders import (
    Posterior,
    decode_video,
    encode_text,
    load_text_encoder,
    load_vae,
    video_posterior,
)
from flashi2v_train.batch import Batch, Series, join, to
from flashi2v_train.buckets import compose
from flashi2v_train.config import RunConfig
from flashi2v_train.world import World

logger = logging.getLogger(__name__)

# Named tensors of a clip: what the VAE says of the whole of it, and of its first frame alone. fp32, (C, F, H, W) and
# (C, 1, H, W), normalised.
Clip = dict[str, Tensor]
# `states`, (L, text_dim) in the encoder's dtype, padding zeroed.
Caption = dict[str, Tensor]


class Encoders:
    """The frozen VAE and text encoder, with room to remember what they have encoded; or what reads a store instead.

    Clips and captions are encoded one by one, so that a sample's features do not depend on its batch, to the last
    bit, and remembering them changes nothing.

    Args:
        config: of the run; an encoder whose features are loaded from a store is not loaded itself.
        device: where to encode.

    Raises:
        InputError: an encoder does not fit the transformer, or cannot be loaded.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        data, model = config.data.dataset_param, config.model
        self._reads_video = data.load_video_features
        self._vae = None if self._reads_video else load_vae(model.ae, device)
        self._text_encoder = None if data.load_text_features else load_text_encoder(model.text_encoder, device)
        if self._vae is not None:
            self._check_width("in_dim", self._vae.config.z_dim)
        if self._text_encoder is not None:
            self._check_width("text_dim", self._text_encoder.config.d_model)
        self._memory: dict[bytes | str, dict[str, Tensor]] = {}
        self._room = int(config.options.feature_cache_gib * 2**30)

    def _check_width(self, key: str, given: int) -> None:
        ours = getattr(self.config.model.predictor, key)
        if ours != given:
            raise InputError(f"{self.config.options.mm_model}: predictor.{key} is {ours}, the encoder gives {given}")

    @torch.no_grad()
    def __call__(self, batch: LoadedBatch, *, sampled: bool) -> Batch:
        """Return latents, condition and text of a batch, see `recipe`, and its columns.

        Args:
            batch: of the loader.
            sampled: draw from the posteriors, by each sample's epoch and index, instead of taking their modes.
        """
        encoded = []
        for i, key in enumerate(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)):
            clip, states = self.clip(batch, i), self.states(batch, i)
            noise, still_noise = self._noise(clip, *key) if sampled else (None, None)
            latents = Posterior(clip["mean"], clip["std"]).draw(noise)
            condition = Posterior(clip["first_frame_mean"], clip["first_frame_std"]).draw(still_noise)
            encoded.append({"latents": latents[None], "condition": condition[None], "text": states[None]})
        return join(encoded) | to(batch.get("columns", {}), self.device)

    def _noise(self, clip: Clip, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return a sample's draws from the posteriors of its video and of its first frame."""
        seed = self.config.options.seed
        names = {"posterior": "mean", "condition posterior": "first_frame_mean"}
        latents, condition = (
            torch.randn(clip[name].shape, generator=generator(seed, purpose, epoch, index))
            for purpose, name in names.items()
        )
        return latents, condition

    def clip(self, batch: LoadedBatch, i: int) -> Clip:
        """Return what the VAE says of sample i's clip."""
        if not self._reads_video:
            assert self._vae is not None
            return self._remember(batch["clip"][i], partial(encode_clip, self._vae, batch, i))
        clip = {name: tensors[i].to(self.device) for name, tensors in batch["video_features"].items()}
        self._check_width("in_dim", len(clip["mean"]))
        return clip

    def states(self, batch: LoadedBatch, i: int) -> Tensor:
        """Return the states of sample i's caption, (L, text_dim)."""
        if self._text_encoder is not None:
            encode = partial(self.caption, batch["prompt_ids"][i], batch["prompt_mask"][i])
            return self._remember(batch["caption"][i], encode)["states"]
        states = batch["text_features"]["states"][i].to(self.device)
        self._check_width("text_dim", states.shape[-1])
        return states

    @torch.no_grad()
    def caption(self, ids: Tensor, mask: Tensor) -> Caption:
        """Encode a caption: token ids (L,), and a mask (L,) that is 1 for text."""
        assert self._text_encoder is not None
        use_mask = self.config.model.text_encoder.use_attention_mask
        ids = ids.to(self.device, non_blocking=True)
        return {"states": encode_text(self._text_encoder, ids[None], mask[None], use_mask=use_mask)[0]}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the videos (B, 3, T, 8 H, 8 W) in [-1, 1] of latents (B, C, F, H, W), on the latents' device."""
        if self._vae is None:
            self._vae = load_vae(self.config.model.ae, self.device)
        return decode_video(self._vae, latents)

    def _remember(self, key: bytes | str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what was encoded under a key before, or encode it and keep it on the CPU while there is room."""
        if key in self._memory:
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in self._memory[key].items()}
        encoded = encode()
        size = sum(tensor.nbytes for tensor in encoded.values())
        if size <= self._room:
            self._room -= size
            self._memory[key] = {name: tensor.cpu() for name, tensor in encoded.items()}
        return encoded


@torch.no_grad()
def encode_clip(vae: AutoencoderKLWan, batch: LoadedBatch, i: int) -> Clip:
    """Return what a VAE says of sample i's clip."""
    video = batch["video"][i : i + 1].to(vae.device, non_blocking=True)
    whole, still = video_posterior(vae, video), video_posterior(vae, video[:, :, :1])
    return {
        "mean": whole.mean[0],
        "std": whole.std[0],
        "first_frame_mean": still.mean[0],
        "first_frame_std": still.std[0],
    }


class Origin(NamedTuple):
    """Where a sample comes from: its key, its video, and its caption as it was encoded."""

    key: SampleKey
    path: str
    caption: str


class FeatureSource:
    """Samples of one optimizer step after the other, without end; made where the first pipeline stage is.

    The processes that work on the same samples (context and tensor parallel ones) read and encode them in turns: of
    G such peers, peer g has every G-th sample, beginning with number g. A round is as many steps as it takes for all
    to have about equally many; then they exchange what they have.

    Args:
        config: of the run.
        world: this process among all.
        provenance: what features must have been made by, where any are loaded.

    Attributes:
        encoders: that make the samples.
        wait_seconds: how long this process has waited for data, since the start.

    Raises:
        InputError: data or encoders do not fit the configuration, or there are fewer samples than one step takes.
    """

    def __init__(self, config: RunConfig, world: World, provenance: Mapping[str, Any] | None = None) -> None:
        self._config, self._world = config, world
        self._num_batches, self._size = config.micro_batches(world.dims), config.options.micro_batch_size
        num_peers = world.peers.size()
        self._steps_per_round = num_peers // math.gcd(self._num_batches * self._size, num_peers)
        self._composed: ComposedSampler | None = None
        self._loader = self._open(provenance)
        self.encoders = Encoders(config, world.device)
        self.wait_seconds = 0.0
        self._batches: Iterator[LoadedBatch] | None = None
        self._ready: deque[tuple[Series, list[Origin]]] = deque()
        self._state = self._loader.state_dict()

    def _open(self, provenance: Mapping[str, Any] | None) -> StatefulLoader:
        config, world, data = self._config, self._world, self._config.data
        peer, num_peers = world.peers.rank(), world.peers.size()
        if data.dataset_param.buckets is not None:
            store = open_store(data.dataset_param.metafile_or_dir_path)
            seed = config.options.seed
            dataset = FlashI2VDataset(store, data.dataset_param, seed=seed, provenance=provenance, held_out=False)
            table = dataset.table
            assert table is not None
            if table.num_left_out:
                logger.info("%d of %d clips are too short for each bucket", table.num_left_out, len(table.number_of))
            self._composed = ComposedSampler(
                compose(config, table, dataset.indices, self._num_batches * world.dims.data),
                rank=world.data_rank,
                num_replicas=world.dims.data,
                peer=peer,
                num_peers=num_peers,
            )
            self._steps_per_round = num_peers
            return StatefulLoader(dataset, self._composed, 1, data.dataloader_param, world.device)
        loader = build_dataloader(
            data,
            seed=config.options.seed,
            batch_size=1,
            rank=world.data_rank + world.dims.data * peer,
            num_replicas=world.dims.data * num_peers,
            device=world.device,
            provenance=provenance,
            num_required=1,  # peers may be more than records; what a step takes is checked here
        )
        total, available = self._num_batches * self._size * world.dims.data, len(loader.dataset)
        if available < total:
            raise InputError(
                f"{data.dataset_param.metafile_or_dir_path} holds {available} records, fewer than the {total} "
                "of one optimizer step: lower --global-batch-size (or --micro-batch-size), or relax the filter"
            )
        return loader

    @property
    def num_skipped(self) -> int:
        """Unreadable videos that this process has met."""
        return len(self._loader.skipped)

    def __next__(self) -> tuple[Series, list[Origin]]:
        """Return the samples of the next step, and where they come from."""
        if not self._ready:
            self._ready.extend(self._read_round())
        if self._composed is None:
            self._state["consumed_samples"] += self._num_batches * self._size * self._world.dims.data
        else:
            self._state["consumed_batches"] += 1
        return self._ready.popleft()

    def _share(self, later: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Return bucket and size of this rank's micro batches of a step, and the samples of all ranks by bucket.

        Args:
            later: than the step that is given out next.
        """
        if self._composed is None:
            total = self._num_batches * self._size * self._world.dims.data
            return [(0, self._size)] * self._num_batches, [total]
        number, counts = self._state["consumed_batches"] + later, [0] * len(self._config.kinds)
        for pack in self._composed.composer.batch(number):
            counts[pack.bucket] += len(pack.keys)
        return [(pack.bucket, len(pack.keys)) for pack in self._composed.share(number)], counts

    def _read_round(self) -> Iterator[tuple[Series, list[Origin]]]:
        if self._batches is None:
            self._batches = iter(self._loader)
        shares = [self._share(later) for later in range(self._steps_per_round)]
        total = sum(size for share, _ in shares for _, size in share)
        own = []
        for _ in range(self._world.peers.rank(), total, self._world.peers.size()):
            started = time.perf_counter()
            loaded = next(self._batches)
            self.wait_seconds += time.perf_counter() - started
            key = SampleKey(int(loaded["epoch"][0]), int(loaded["index"][0]))
            origin = Origin(key, loaded["path"][0], loaded["caption"][0])
            own.append((self.encoders(loaded, sampled=self._config.model.ae.do_sample), origin))
        samples = iter(own if self._world.peers.size() == 1 else self._exchange(own, total))
        for share, counts in shares:
            packs = [[next(samples) for _ in range(size)] for _, size in share]
            batches = [join([sample for sample, _ in pack]) for pack in packs]
            yield Series(batches, [bucket for bucket, _ in share], counts), [o for pack in packs for _, o in pack]

    def _exchange(self, own: list[tuple[Batch, Origin]], total: int) -> list[tuple[Batch, Origin]]:
        """Send each sample, of any shape, from the peer that has it to all; number u is the (u // G)-th of u % G."""
        group, device = self._world.peers, self._world.device
        told: list[Any] = [None] * group.size()
        about = [({name: (t.shape, t.dtype) for name, t in sample.items()}, origin) for sample, origin in own]
        dist.all_gather_object(told, about, group)
        everyones = []
        for number in range(total):
            turn, peer = divmod(number, group.size())
            shapes, origin = told[peer][turn]
            if peer == group.rank():
                sample = {name: tensor.contiguous() for name, tensor in own[turn][0].items()}
            else:
                sample = {
                    name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
                }
            for tensor in sample.values():
                dist.broadcast(tensor, group=group, group_src=peer)
            everyones.append((sample, origin))
        return everyones

    def state_dict(self) -> dict[str, Any]:
        """Return where the steps that were given out end, whatever has been read ahead."""
        return {**self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps of a state, on any layout.

        Raises:
            InputError: the state belongs to other data or another seed.
        """
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()
        self._batches = None
        self._ready.clear()

    def close(self) -> None:
        """End the loader's workers."""
        self._loader.close()
