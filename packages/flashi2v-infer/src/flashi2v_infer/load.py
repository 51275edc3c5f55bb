"""Where a pipeline comes from: a configuration file, or a directory in diffusers' layout. Every part loads strictly."""

import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin

from flashi2v_data.captions.tokenizer import load_model
from flashi2v_data.errors import InputError
from flashi2v_infer import demo
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.defaults import FILE, directory_of
from flashi2v_infer.execution import DTypes, Execution, Settled
from flashi2v_infer.files.records import Source
from flashi2v_infer.lora import load_adapters
from flashi2v_infer.model_index import check_model_index, class_of
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.placement import Sharing, home, home_of_transformer, place
from flashi2v_infer.settings import SamplingSettings
from flashi2v_infer.speed import calibration_in, planned_calls
from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.adapter_choice import AdapterChoice, read_choices
from flashi2v_model.config import AEConfig, PredictorConfig, SchedulerName, check_pretrained
from flashi2v_model.encoders import DTYPES, load_pretrained, load_text_encoder, load_vae
from flashi2v_model.errors import named
from flashi2v_model.layers import use_fused_rms_norm
from flashi2v_model.parallel.degrees import ContextDegrees, choose_degrees
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.quantization import quantize
from flashi2v_model.sampling import set_timesteps
from flashi2v_model.scheduler import make_scheduler
from flashi2v_model.speed.choice import Calls
from flashi2v_model.speed.plan import plan_of
from flashi2v_model.variants import transformer_class
from flashi2v_model.weights.fingerprint import fingerprint
from flashi2v_model.weights.reading import check_directory, read_json, weight_files
from flashi2v_npu_ops import UnsupportedError
from flashi2v_npu_ops.device import claim_device, resolve_device
from flashi2v_npu_ops.registry import check_environment

if TYPE_CHECKING:
    from flashi2v_infer.processes import Processes

logger = logging.getLogger(__name__)

_AS_IT_SAYS = Execution()
PartConfig = dict[str, Any] | None  # of a config.json; None where there is none on this disk


def load_from_config(config: InferenceConfig, execution: Execution = _AS_IT_SAYS) -> FlashI2VPipeline:
    """Build the pipeline that a configuration file describes.

    Args:
        config: of inference_model.json.
        execution: how to compute; what it leaves open is as the file says.

    Raises:
        InputError: parts do not fit each other, or a part or the device is missing or damaged.
    """
    model = ConfiguredModel(config, execution)
    return model.load(model.settle())


def load_from_pretrained(model: str, execution: Execution = _AS_IT_SAYS) -> FlashI2VPipeline:
    """Load a whole pipeline.

    Args:
        model: a directory in diffusers' layout, or a hub id.
        execution: how to compute.

    Raises:
        InputError: there is no such directory or device, it holds no whole pipeline, or a part's weights are not those
            of the part.
    """
    directory = ModelDirectory(model, execution)
    directory.check()
    return directory.load(directory.settle())


def find_device(name: str, *, claim: bool = False) -> torch.device:
    """Return the device called `name`; `claim` makes it this process's own (`device.claim_device`).

    Raises:
        InputError: this machine lacks it; the message says how to choose another.
        flashi2v_npu_ops.UnsupportedError: FLASHI2V_OPS_BACKEND makes no sense on it.
    """
    try:
        device = claim_device(name) if claim else resolve_device(name)
    except UnsupportedError as error:
        raise InputError(f'{error}; or choose another: "device": "auto" in the file, or --device auto') from None
    check_environment(device.type)
    return device


class Model(ABC):
    """Where a pipeline comes from, and how it is to compute; nothing is read before it is asked for.

    Attributes:
        execution: how to compute.
        device_name: where, as of `find_device`.
        scheduler: the sampler; None is the model's own.
        dtypes: that a configuration file names.
        ae: settings of the VAE's tiles, where a configuration file has some.
        lora: adapters of the transformer.
    """

    execution: Execution
    device_name: str
    scheduler: SchedulerName | None = None
    dtypes: DTypes | None = None
    ae: AEConfig | None = None
    lora: tuple[AdapterChoice, ...] = ()

    def settle(self, device: torch.device | None = None) -> Settled:
        """Decide what is left open of how to compute, on a device, or on the one that is found by its name.

        Raises:
            InputError: this machine lacks it, or the execution makes no sense on it.
        """
        return self.execution.settle(device or find_device(self.device_name), self.dtypes)

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be seen to be missing (`InputError`), before anything large is read."""

    @abstractmethod
    def weights_directory(self) -> Path | None:
        """Return where the transformer's weights lie; None where they are not on this disk yet."""

    @abstractmethod
    def sampler(self) -> SchedulerMixin | None:
        """Return the scheduler of a run; None where its configuration is not on this disk yet."""

    def calls(self, settings: SamplingSettings) -> Calls | None:
        """Return which calls of the network a run makes; None: all of them, or the model is not on this disk yet.

        Raises:
            InputError: some are to be left out, and the model is not calibrated.
        """
        plan, directory = plan_of(settings.speed), self.weights_directory()
        if plan.is_exact or directory is None:
            return None
        calibration, scheduler = calibration_in([directory]), self.sampler()
        assert scheduler is not None
        set_timesteps(scheduler, settings.num_inference_steps, torch.device("cpu"))
        return planned_calls(plan, calibration, scheduler, settings)

    @abstractmethod
    def part_configs(self) -> tuple[PartConfig, PartConfig, PartConfig]:
        """Return the constructor arguments of transformer, text encoder and VAE; nothing but config.json is read."""

    @abstractmethod
    def load(self, settled: Settled, processes: "Processes | None" = None) -> FlashI2VPipeline:
        """Build the pipeline; `processes` share each video as the execution says; None: there is this one.

        Raises:
            InputError: a part is missing or damaged, or parts do not fit each other.
        """

    @abstractmethod
    def source(self, pipeline: FlashI2VPipeline) -> Source:
        """Return what a video's record says of the model, once it is loaded."""

    def _settings(self) -> dict[str, Any]:
        """Return what a record says of the execution."""
        recipe = self.execution.recipe
        # Tiles that were asked for are a setting like others; what the free memory decides is compared with nothing.
        settings: dict[str, Any] = {
            "vae_tiling": self.execution.vae_tiling,
            "network": {"recipe": recipe} if recipe else {},
        }
        if self.lora:
            settings["lora"] = [[fingerprint(choice.source), choice.scale] for choice in self.lora]
        if self.execution.quantize is not None:
            settings["quantize"] = self.execution.quantize
        return settings

    def check_changes(self) -> None:
        """Refuse what cannot be done to the transformer before it is read: it is done to a model without numbers.

        Raises:
            InputError: naming the adapter that does not fit, what is not installed, or degrees that do not fit.
        """
        config = self.part_configs()[0]
        if config is not None:
            degrees_of(self.execution, config.get("num_attention_heads", TRANSFORMERS["1.3b"]["num_attention_heads"]))
        if (self.lora or self.execution.quantize) and config is not None:
            with torch.device("meta"):
                network = transformer_class(self.execution.recipe).from_config(config)
            self.change(network)

    def change(self, transformer: FlashI2VTransformer3DModel, device: torch.device | None = None) -> None:
        """Quantise a transformer's weights and load adapters, as they are asked for.

        Args:
            transformer: on any device, meta included.
            device: that it will compute on; None: the one that it is on.
        """
        if self.execution.quantize is not None:
            quantize(transformer, self.execution.quantize, device)
        load_adapters(transformer, self.lora)

    def prompt_note(self, prompt: str) -> str | None:
        """Return what to tell, before sampling, whoever asks the model for more than it knows."""
        return None

    def image_note(self, vae_psnr: float) -> str | None:
        """Return what to tell of an image that the VAE alone repaints with so many dB PSNR."""
        return None


class ConfiguredModel(Model):
    """The model that a configuration file describes.

    Args:
        config: of inference_model.json.
        execution: how to compute; what it leaves open is as the file says.
        lora: adapters; None are the file's.
    """

    def __init__(
        self, config: InferenceConfig, execution: Execution, lora: tuple[AdapterChoice, ...] | None = None
    ) -> None:
        self.config, self.execution = config.computed_by(execution), execution
        self.lora = read_choices(config.lora) if lora is None else lora
        self.device_name = execution.device or config.device
        self.scheduler, self.ae, self.dtypes = config.diffusion.scheduler, self.config.ae, self.config.dtypes

    def check(self) -> None:
        config = self.config
        assert config.predictor.from_pretrained is not None
        weight_files(Path(config.predictor.from_pretrained))
        check_pretrained(config.text_encoder.from_pretrained, "text_encoder.from_pretrained")
        check_pretrained(config.ae.from_pretrained, "ae.from_pretrained")
        _check_tokenizer(config.tokenizer.from_pretrained)
        self.check_changes()

    def weights_directory(self) -> Path | None:
        return Path(str(self.config.predictor.from_pretrained))

    def sampler(self) -> SchedulerMixin:
        return make_scheduler(self.config.diffusion.scheduler, self.config.diffusion.shift)

    def part_configs(self) -> tuple[PartConfig, PartConfig, PartConfig]:
        encoder, ae = self.config.text_encoder.from_pretrained, self.config.ae.from_pretrained
        return (
            self.config.predictor.transformer_arguments(),
            _read_config(Path(encoder), "text_encoder.from_pretrained"),
            _read_config(Path(ae), "ae.from_pretrained"),
        )

    def load(self, settled: Settled, processes: "Processes | None" = None) -> FlashI2VPipeline:
        config, predictor, device = self.config, self.config.predictor, settled.device
        where = home(settled.execution, device)
        if device.type == "cpu" and predictor.dtype != "fp32":
            logger.warning("%s is slow on most CPUs: set predictor.dtype to fp32", predictor.dtype)
        for note in predictor.notes():
            logger.info(note)
        self.check_changes()
        first = home_of_transformer(settled.execution, device)
        transformer = _load_transformer(predictor, first, transformer_class(settled.execution.recipe))
        self.change(transformer, device)
        transformer.to(where)
        tokenizer = _load_tokenizer(config.tokenizer.from_pretrained)
        text_encoder = load_text_encoder(config.text_encoder, where)
        vae = load_vae(config.ae, where)
        for ours, theirs, what in (
            (predictor.text_dim, text_encoder.config.d_model, "predictor.text_dim is {}, the text encoder's is {}"),
            (predictor.in_dim, vae.config.z_dim, "predictor.in_dim is {}, the VAE has {} latent channels"),
        ):
            if ours != theirs:
                raise InputError(what.format(ours, theirs))
        scheduler, use_mask = self.sampler(), config.text_encoder.use_attention_mask
        pipeline = FlashI2VPipeline(tokenizer, text_encoder, vae, transformer, scheduler, use_attention_mask=use_mask)
        place(pipeline, settled.execution, device, _sharing(settled.execution, transformer, processes))
        return pipeline

    def source(self, pipeline: FlashI2VPipeline | None = None) -> Source:
        """Return what a video's record says of the model: here it is known before the model is loaded."""
        return self._source

    @cached_property
    def _source(self) -> Source:
        config = self.config
        parts = {
            "predictor": str(config.predictor.from_pretrained),
            "ae": config.ae.from_pretrained,
            "text_encoder": config.text_encoder.from_pretrained,
            "tokenizer": config.tokenizer.from_pretrained,
        }
        settings = {**config.model_settings, **self._settings()}
        weights = {part: fingerprint(path) for part, path in parts.items()}
        return Source(parts["predictor"], settings, weights, tuple(map(str, self.lora)))


class ModelDirectory(Model):
    """A pipeline in diffusers' layout.

    Args:
        name: its directory, a hub id, or "demo".
        execution: how to compute.
        scheduler: the sampler; None is the model's own.
        lora: adapters.
        flow_shift: of the noise levels; None is the model's own.
    """

    def __init__(
        self,
        name: str,
        execution: Execution,
        scheduler: SchedulerName | None = None,
        lora: tuple[AdapterChoice, ...] = (),
        flow_shift: float | None = None,
    ) -> None:
        self.name, self.execution, self.scheduler, self.lora = str(directory_of(name)), execution, scheduler, lora
        self.flow_shift = flow_shift
        self.device_name = execution.device or "auto"

    def check(self) -> None:
        self.directory()
        self.check_changes()

    def directory(self) -> Path | None:
        """Return the directory, or None for what has the form of a hub id.

        Raises:
            InputError: it is neither.
        """
        path = Path(self.name)
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise InputError(
                    f"--model: {path} holds no model_index.json, so it is not a pipeline in diffusers' layout"
                )
            return path
        if path.exists() or path.is_absolute() or self.name.startswith(".") or self.name.count("/") != 1:
            raise InputError(
                f"--model: no directory {self.name!r}: give one in diffusers' layout, or a hub id (owner/name)"
            )
        return None

    def _fetched(self) -> Path:
        """Return where the files of a hub id are on this disk.

        Raises:
            InputError: they cannot be had.
        """
        try:
            return Path(FlashI2VPipeline.download(self.name))
        except Exception as error:  # whatever the libraries raise
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(f"--model: there is no directory {self.name}, nor is it on the hub: {reason}") from error

    def weights_directory(self) -> Path | None:
        path = self.directory()
        return None if path is None else path / "transformer"

    def sampler(self) -> SchedulerMixin | None:
        if (path := self.directory()) is None:
            return None
        config = read_json(path / "scheduler" / "scheduler_config.json")
        own: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if SchedulerMixin not in getattr(own, "__mro__", ()):
            raise InputError(f"--model: {path / 'scheduler'} names no scheduler of diffusers")
        return rescheduled(own.from_config(config), self.scheduler, self.flow_shift)

    def part_configs(self) -> tuple[PartConfig, PartConfig, PartConfig]:
        if (path := self.directory()) is None:
            return None, None, None
        transformer, text_encoder, vae = (
            _read_config(path / part, "--model") for part in ("transformer", "text_encoder", "vae")
        )
        return transformer, text_encoder, vae

    def load(self, settled: Settled, processes: "Processes | None" = None) -> FlashI2VPipeline:
        directory = self.directory() or self._fetched()
        with named("--model"):
            check_model_index(directory)
            encoder = class_of("text_encoder", read_json(directory / FILE)["text_encoder"])
            for name in ("tokenizer", "scheduler"):
                if (directory / name).is_dir():
                    check_directory(directory / name)
        self.check_changes()
        where = home(settled.execution, settled.device)

        def part(cls: Any, name: str, dtype: str, device: torch.device = where) -> Any:
            loaded = load_pretrained(cls, str(directory), "--model", DTYPES[dtype], device, subfolder=name)
            return loaded.requires_grad_(False).eval()

        network = transformer_class(settled.execution.recipe)
        first = home_of_transformer(settled.execution, settled.device)
        parts = {
            "transformer": part(network, "transformer", settled.dtypes.transformer, first),
            "text_encoder": part(encoder, "text_encoder", settled.dtypes.text_encoder),
            "vae": part(AutoencoderKLWan, "vae", settled.dtypes.vae),
        }
        self.change(parts["transformer"], settled.device)
        parts["transformer"].to(where)
        try:
            pipeline: FlashI2VPipeline = FlashI2VPipeline.from_pretrained(directory, **parts)
        except Exception as error:  # whatever the libraries raise on what they cannot read
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(f"--model: cannot load {self.name}: {reason}") from error
        pipeline.scheduler = rescheduled(pipeline.scheduler, self.scheduler, self.flow_shift)
        sharing = _sharing(settled.execution, parts["transformer"], processes)
        place(pipeline, settled.execution, settled.device, sharing)
        return pipeline

    def source(self, pipeline: FlashI2VPipeline) -> Source:
        settings = {
            "dtype": dtype_name(pipeline.transformer),
            "vae_dtype": dtype_name(pipeline.vae),
            **self._settings(),
            "scheduler": {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__},
        }
        return Source(self.name, settings, {"pipeline": fingerprint(self.name)}, tuple(map(str, self.lora)))

    def prompt_note(self, prompt: str) -> str | None:
        return demo.prompt_note(prompt) if Path(self.name) == demo.DIRECTORY else None

    def image_note(self, vae_psnr: float) -> str | None:
        return demo.image_note(vae_psnr) if Path(self.name) == demo.DIRECTORY else None


def degrees_of(execution: Execution, num_heads: int) -> ContextDegrees:
    """Return how processes share the tokens of a video, in a network with so many heads.

    Raises:
        InputError: there are more of them to exchange heads than heads.
    """
    with named(f"--context-parallel-size {execution.context_parallel_size}"):
        return choose_degrees(execution.context_parallel_size, num_heads, execution.ulysses_degree)


def _sharing(
    execution: Execution, transformer: FlashI2VTransformer3DModel, processes: "Processes | None"
) -> Sharing | None:
    degrees = degrees_of(execution, transformer.config.num_attention_heads)
    return None if processes is None else processes.sharing(degrees)


def rescheduled(own: SchedulerMixin, name: SchedulerName | None, shift: float | None) -> SchedulerMixin:
    """Return a sampler in the place of a model's own: another one, or with another shift of the noise levels."""
    key = "shift" if "shift" in own.config else "flow_shift"
    if name is not None:
        return make_scheduler(name, float(own.config.get(key, 1.0) if shift is None else shift))
    return own if shift is None else type(own).from_config({**own.config, key: shift})


def dtype_name(module: Any) -> str:
    """Return a part's dtype as torch calls it."""
    return str(module.dtype).removeprefix("torch.")


def cast(transformer: FlashI2VTransformer3DModel, dtype: torch.dtype) -> None:
    """Set dtypes as `from_pretrained` does: some parameters stay in fp32, so that both ways of loading are equal."""
    for name, parameter in transformer.named_parameters():
        kept = any(part in transformer._keep_in_fp32_modules for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _load_transformer(
    config: PredictorConfig, device: torch.device, network: type[FlashI2VTransformer3DModel]
) -> FlashI2VTransformer3DModel:
    with torch.device("meta"):  # random start values of a large model would take minutes
        transformer = network(**config.transformer_arguments())
    use_fused_rms_norm(transformer, config.use_fused_rmsnorm)
    cast(transformer, DTYPES[config.dtype])
    assert config.from_pretrained is not None
    transformer.register_to_config(_name_or_path=config.from_pretrained)  # as diffusers does
    load_weights(transformer, config.from_pretrained)  # the file's own tensors, so that there is no second copy
    transformer.to(device).requires_grad_(False).eval()
    return transformer


def _read_config(directory: Path, key: str) -> PartConfig:
    path = directory / "config.json"
    if not path.exists():
        return None
    with named(key):
        check_directory(directory)
        return read_json(path)


def _check_tokenizer(path: str) -> None:
    if not Path(path).is_dir():
        raise InputError(f"tokenizer.from_pretrained: no directory {path!r}")


def _load_tokenizer(path: str) -> Any:
    _check_tokenizer(path)
    with named("tokenizer.from_pretrained"):
        check_directory(Path(path))
    return load_model(path, "tokenizer.from_pretrained")
