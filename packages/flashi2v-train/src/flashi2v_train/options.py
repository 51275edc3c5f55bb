"""The command line of `flashi2v-train`, under Megatron's names: one class per part of the program that reads it.

Nothing heavy is imported here, so that a wrong option is reported at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

# The matrices of the blocks.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def flag(name: str) -> str:
    """Return an option as one types it."""
    return f"--{name.replace('_', '-')}"


def _given(options: BaseModel, section: type[BaseModel]) -> list[str]:
    """Return the names of a section's options that were given."""
    return [name for name in section.model_fields if name in options.model_fields_set]


class FileOptions(BaseModel):
    """What to train, on what."""

    mm_model: Path = Field(description="model file (JSON with # comments): encoders, diffusion, transformer")
    mm_data: Path = Field(description="data file (JSON with # comments): dataset and loader")


class RecipeOptions(BaseModel):
    """What to learn."""

    recipe: str | None = Field(
        None,
        description="module:Class of a flashi2v_train.Recipe, or of a network alone, in the working directory or "
        "installed; default: FlashI2V's own",
    )
    start: Literal["random", "still"] = Field(
        "random",
        description="start values, where predictor.from_pretrained names no weights; with still ones a video stays as "
        "its first frame is, and only motion is left to learn",
    )


class PlanOptions(BaseModel):
    """Questions that start nothing."""

    dry_run: bool = Field(
        False, description="print configuration, layout, parameters, predicted memory and FLOPs per process, and exit"
    )
    suggest_split: bool = Field(
        False, description="print the best pipeline_num_layers for this model and layout, and exit"
    )


class LaunchOptions(BaseModel):
    """Processes: how many, where, and how they find each other."""

    device: str = Field("auto", description="auto, npu, cuda or cpu")
    nproc_per_node: int = Field(1, ge=1, description="processes to start on this machine")
    nnodes: str = Field("1", pattern=r"^\d+(:\d+)?$", description="machines, or MIN:MAX for an elastic run")
    node_rank: int = Field(0, ge=0, description="this machine among --nnodes, where --master-addr names the first")
    master_addr: str = Field("localhost", description="the first machine")
    master_port: int = Field(0, ge=0, lt=65536, description="a free port on it; default: any, on one machine")
    rdzv_backend: Literal["static", "c10d", "etcd-v2"] | None = Field(
        None, description="how machines find each other; default: c10d with --rdzv-endpoint, else static"
    )
    rdzv_endpoint: str = Field("", description="host:port at which they meet, for --rdzv-backend c10d")
    rdzv_id: str = Field("", description="name of the run, the same on all machines")
    max_restarts: int = Field(
        0,
        ge=0,
        description="how often to start all processes again after one failed, whatever the fault; they resume",
    )


class ParallelOptions(BaseModel):
    """How one model and one batch are spread over the processes; data parallelism takes what the others leave."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="processes that share each layer's matrices")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="processes that share the layers")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=1, description="pieces of layers per pipeline process"
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] | None = Field(
        None, description="order of the micro batches; default: interleaved with virtual stages, else 1f1b"
    )
    context_parallel_size: int = Field(1, ge=1, description="processes that share the tokens of a video")
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] | None = Field(
        None,
        description="they exchange heads (ulysses), pass keys on around a ring (megatron), or both (hybrid); default: "
        "both, such that all have equally many heads",
    )
    ulysses_degree_in_cp: int | None = Field(
        None, ge=1, description="processes of them that exchange heads, the ring has the rest: with hybrid_cp_algo"
    )
    use_distributed_optimizer: bool = Field(
        True, description="shard weights, gradients and optimizer over data parallel processes (FSDP2); no: replicate"
    )
    num_distributed_optimizer_instances: int = Field(
        1, ge=1, description="groups of data parallel processes that each hold all shards (HSDP)"
    )
    reshard_after_forward: Literal["auto", "always", "never"] = Field(
        "auto", description="free gathered weights between forward and backward; auto: except in a pipeline"
    )
    fsdp_cpu_offload: bool = Field(False, description="keep shards and optimizer in the CPU's memory")

    @property
    def reshards(self) -> bool:
        """Whether gathered weights are freed between forward and backward."""
        # A pipeline runs both of many micro batches in turn, and would gather for each.
        in_a_pipeline = self.pipeline_model_parallel_size > 1
        return self.reshard_after_forward == "always" or (self.reshard_after_forward == "auto" and not in_a_pipeline)


class BatchOptions(BaseModel):
    """How long, and on how much at a time."""

    seed: int = Field(1024, description="of everything random")
    bf16: bool | None = Field(
        None,
        description="compute in bf16 with fp32 master weights and fp32 gradient reduction; "
        "default: what predictor.dtype says",
    )
    train_iters: int = Field(1_000_000, ge=1, description="optimizer steps of the whole run, resumed ones included")
    micro_batch_size: int = Field(1, ge=1, description="samples of one forward and backward on one device")
    global_batch_size: int | None = Field(
        None, ge=1, description="samples of one optimizer step; default: micro batch size x data parallel processes"
    )


class OptimizerOptions(BaseModel):
    """Learning rate, AdamW, clipping, moving average."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        "constant", description="how the learning rate falls after the warm-up"
    )
    lr_decay_iters: int | None = Field(None, ge=1, description="step at which the decay ends; default: --train-iters")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine"] = Field(
        "exponential", description="how WSD (warm-up, stable, decay) decays"
    )
    lr_wsd_decay_iters: int | None = Field(None, ge=1, description="steps of WSD's decay")
    lr_warmup_iters: int = Field(0, ge=0, description="steps of linear warm-up")
    lr_warmup_fraction: float | None = Field(None, ge=0, lt=1, description="the same as a share of --lr-decay-iters")
    lr_warmup_init: float = Field(0.0, ge=0, description="learning rate at which the warm-up starts")
    proj_lr_scale: float = Field(
        1.0, gt=0, description="factor on the learning rate of learnable_proj, which starts at zero and learns slowly"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_eps: float = Field(1e-15, gt=0, description="added to the root of those")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled from the gradient, as AdamW has it")
    clip_grad: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    clip_grad_ema_decay: float | None = Field(
        None, gt=0, lt=1, description="clip adaptively: the threshold follows the norms' moving mean with this decay"
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="steps in a row with a non-finite loss or gradient, each skipped, that end the run"
    )
    freeze: list[str] = Field(
        [], description="parameters to leave as they are, by glob pattern, for example 'blocks.*.attn2.*'"
    )
    use_ema: bool = Field(True, description="keep an exponential moving average of the weights")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="share of the average that stays at each step")

    @model_validator(mode="after")
    def _check_rate(self) -> "OptimizerOptions":
        if self.lr_decay_style == "constant" and self.min_lr not in (0, self.lr):
            raise ValueError("--min-lr has no effect with --lr-decay-style constant: choose another style")
        if self.lr_decay_style == "constant" and self.lr_decay_iters is not None and self.lr_warmup_fraction is None:
            raise ValueError("--lr-decay-iters has no effect with --lr-decay-style constant: choose another style")
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters is not None):
            raise ValueError("--lr-wsd-decay-iters and --lr-decay-style WSD go together: give both or neither")
        if self.lr_decay_style != "WSD" and "lr_wsd_decay_style" in self.model_fields_set:
            raise ValueError("--lr-wsd-decay-style has no effect without --lr-decay-style WSD")
        if self.lr_warmup_iters and self.lr_warmup_fraction is not None:
            raise ValueError("--lr-warmup-iters and --lr-warmup-fraction say the same: give one of them")
        if self.lr_warmup_init and not (self.lr_warmup_iters or self.lr_warmup_fraction):
            raise ValueError("--lr-warmup-init has no effect without --lr-warmup-iters")
        if self.min_lr > self.lr or self.lr_warmup_init > self.lr:
            raise ValueError(f"--min-lr and --lr-warmup-init must not exceed --lr {self.lr}")
        return self


class MemoryOptions(BaseModel):
    """What is computed twice or kept elsewhere to save memory, and what is compiled to save time."""

    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="in the backward pass compute again: whole layers, or only their attention"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="with full: uniform keeps the input of every n-th layer; block recomputes the first n"
    )
    recompute_num_layers: int | None = Field(None, ge=0, description="n of --recompute-method, per pipeline stage")
    recompute_skip_core_attention: bool = Field(
        False, description="of some layers recompute all but the attention itself"
    )
    recompute_num_layers_skip_core_attention: int = Field(0, ge=0, description="how many, per pipeline stage")
    compile: bool = Field(False, description="compile the blocks with torch.compile")
    feature_cache_gib: float = Field(
        0.0,
        ge=0,
        description="memory for encoded clips and captions per process: each is encoded once, not once per epoch",
    )

    @model_validator(mode="after")
    def _check_recompute(self) -> "MemoryOptions":
        full = self.recompute_granularity == "full"
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise ValueError(
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers, for example "
                "uniform and 1"
            )
        if not full and (self.recompute_method is not None or self.recompute_num_layers is not None):
            raise ValueError("--recompute-method and --recompute-num-layers need --recompute-granularity full")
        if self.recompute_method == "uniform" and not self.recompute_num_layers:
            raise ValueError("--recompute-method uniform needs --recompute-num-layers of at least 1")
        if self.recompute_skip_core_attention != bool(self.recompute_num_layers_skip_core_attention):
            raise ValueError(
                "--recompute-skip-core-attention and --recompute-num-layers-skip-core-attention go together: "
                "give both or neither"
            )
        if self.recompute_skip_core_attention and self.recompute_method != "block":
            raise ValueError(
                "--recompute-skip-core-attention goes with --recompute-granularity full and --recompute-method block, "
                "as in the reference"
            )
        return self


class CheckpointOptions(BaseModel):
    """The run on disk."""

    save: Path = Field(Path("save"), description="the run's directory: metrics, configuration, checkpoints")
    load: Path | None = Field(None, description="run to resume; default: the one in --save, if there is one")
    load_iteration: int | None = Field(
        None, ge=1, description="resume from this checkpoint instead of the newest; later ones are overwritten"
    )
    save_interval: int = Field(1000, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_checkpoints: int | None = Field(None, ge=1, description="how many of the newest to keep; default: all")
    async_save: bool = Field(True, description="write checkpoints while training continues")
    load_optim: bool = Field(True, description="resume the optimizer, too; no: start it anew")
    save_optim: bool = Field(True, description="save the optimizer, too; no: a run cannot be resumed exactly")


class LoraOptions(BaseModel):
    """Adapters that are trained in place of all weights."""

    lora_rank: int | None = Field(
        None, ge=1, description="train LoRA adapters of this rank, and leave the weights of the model as they are"
    )
    lora_alpha: float | None = Field(None, gt=0, description="what they add is weighed by alpha / rank; default: by 1")
    lora_targets: list[str] = Field(
        [*LORA_TARGETS], description="matrices that get one, by the ends of their names; again for another"
    )
    lora_also: list[str] = Field(
        [], description="a part to train whole beside them, such as learnable_proj or fourier_embedding; again likewise"
    )
    lora_from: str | None = Field(
        None,
        description="an adapter to go on with: a file, a directory, a hub id, or a run; it says rank, alpha and layers",
    )
    lora_quantize: Literal["int8"] | None = Field(
        None, description="keep the matrices of the model in 8 bits (torchao): pip install 'flashi2v-train[quantize]'"
    )

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained."""
        return self.lora_rank is not None or self.lora_from is not None

    @model_validator(mode="after")
    def _check_lora(self) -> "LoraOptions":
        given = _given(self, LoraOptions)
        said = [name for name in given if name in ("lora_rank", "lora_alpha", "lora_targets")]
        if self.lora_from is not None and said:
            raise ValueError(f"{flag(said[0])} is said by the adapter of --lora-from: leave it out")
        if given and not self.trains_adapters:
            raise ValueError(f"{flag(given[0])} has no effect without --lora-rank or --lora-from")
        return self


class WatchOptions(BaseModel):
    """What a run says of itself."""

    log_interval: int = Field(1, ge=1, description="steps between lines of metrics")
    tensorboard_log_interval: int = Field(1, ge=1, description="steps between points of TensorBoard's curves")
    distributed_timeout_minutes: float = Field(
        30, gt=0, description="end the run, naming the process that is behind, when a step takes longer"
    )
    wandb_project: str = Field(
        "", description="also log to this project of Weights & Biases (pip install 'flashi2v-train[wandb]')"
    )
    wandb_exp_name: str = Field("", description="name of the run there; default: that of --save")
    wandb_save_dir: Path | None = Field(None, description="where wandb keeps its files; default: --save")
    eval_interval: int | None = Field(
        None, ge=1, description="steps between validations: loss at fixed sigmas, and sampled videos"
    )
    eval_iters: int = Field(10, ge=1, description="micro batches of the validation loss, over all processes")
    eval_data: Path | None = Field(None, description="data file of the validation; default: --mm-data")
    eval_videos: int = Field(2, ge=0, description="videos to sample at each validation, with film strips")
    eval_steps: int = Field(20, ge=1, description="sampling steps of those (not diffusion.num_inference_steps)")
    eval_ema: bool = Field(False, description="validate the moving average of the weights instead of the weights")

    @model_validator(mode="after")
    def _check_validation(self) -> "WatchOptions":
        idle = [name for name in _given(self, WatchOptions) if name.startswith("eval_")]
        if idle and self.eval_interval is None:
            raise ValueError(f"{flag(idle[0])} has no effect without --eval-interval: give both or neither")
        return self


class ForeignOptions(BaseModel):
    """Options of the reference's script whose wish is always, or never, granted here: accepted, and answered.

    The description of each is the answer.
    """

    mm_tool: Path | None = Field(None, description="no effect: the file configures profilers of the reference alone")
    distributed_backend: str | None = Field(
        None, description="no effect: the backend follows --device (hccl, nccl or gloo)"
    )
    optimizer_selection: Literal["fused_ema_adamw", "fused_adamw"] | None = Field(
        None, description="always AdamW, fused where the device has it; --use-ema decides on the moving average"
    )
    data_parallel_random_init: bool | None = Field(
        None, description="no effect: all data parallel processes start from the same weights"
    )
    gradient_accumulation_fusion: bool | None = Field(
        None, description="no effect: it is a kernel of Megatron's own linear layers"
    )
    accumulate_allreduce_grads_in_fp32: bool | None = Field(
        None, description="always so: gradients are kept and reduced in fp32"
    )
    fp32_residual_connection: bool | None = Field(
        None, description="no effect: hidden states have the dtype of --bf16; norms and softmax compute in fp32"
    )
    attention_softmax_in_fp32: bool | None = Field(None, description="always so, within the attention's kernels")
    overlap_grad_reduce: bool | None = Field(None, description="always so, with --use-distributed-optimizer")
    overlap_param_gather: bool | None = Field(None, description="always so, with --use-distributed-optimizer")
    load_rng: bool | None = Field(None, description="no effect: draws depend on --seed and the sample, not on a state")
    save_rng: bool | None = Field(None, description="no effect: draws depend on --seed and the sample, not on a state")

    @model_validator(mode="after")
    def _check_wishes(self) -> "ForeignOptions":
        fixed = ("accumulate_allreduce_grads_in_fp32", "attention_softmax_in_fp32")
        for name in (*fixed, "overlap_grad_reduce", "overlap_param_gather"):
            if getattr(self, name) is False:
                raise ValueError(f"{flag(f'no_{name}')} cannot be honoured: it is always so; leave it out")
        return self

    def unanswered(self) -> set[str]:
        """Return the names of those that were not given."""
        return {*ForeignOptions.model_fields} - self.model_fields_set

    def notes(self) -> list[str]:
        """Answer those that were given, one line each."""
        fields = ForeignOptions.model_fields
        return [f"{flag(name)}: {fields[name].description}" for name in _given(self, ForeignOptions)]


@Parameter(name="*")
class TrainOptions(
    ForeignOptions,
    WatchOptions,
    CheckpointOptions,
    MemoryOptions,
    LoraOptions,
    OptimizerOptions,
    BatchOptions,
    ParallelOptions,
    LaunchOptions,
    PlanOptions,
    RecipeOptions,
    FileOptions,
):
    """All options of `flashi2v-train`."""

    model_config = ConfigDict(extra="forbid")

    @property
    def decay_end(self) -> int:
        """The step at which the learning rate's decay ends."""
        return self.lr_decay_iters or self.train_iters

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the learning rate's warm-up."""
        return self.lr_warmup_iters or round((self.lr_warmup_fraction or 0) * self.decay_end)

    @model_validator(mode="after")
    def _check_schedule(self) -> "TrainOptions":
        again = self.recompute_granularity == "full" or self.recompute_skip_core_attention
        if self.pipeline_schedule == "zero-bubble":
            found = {
                "--recompute-granularity full": again,
                "--compile": self.compile,
                "--freeze": bool(self.freeze),
                "LoRA": self.trains_adapters,
            }
            if other := next((name for name, there in found.items() if there), None):
                raise ValueError(
                    "--pipeline-schedule zero-bubble takes the backward pass of a layer apart, which "
                    f"{other} does not allow: choose another schedule, or leave that out"
                )
        return self

    @model_validator(mode="after")
    def _check_contradictions(self) -> "TrainOptions":
        if self.freeze and self.trains_adapters:
            raise ValueError("--freeze has no effect with LoRA, which trains the adapters alone: leave it out")
        if not self.use_ema and self.ema_decay != OptimizerOptions.model_fields["ema_decay"].default:
            raise ValueError("--ema-decay has no effect with --no-use-ema: leave one of them out")
        if self.eval_ema and not self.use_ema:
            raise ValueError("--eval-ema contradicts --no-use-ema: leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> "TrainOptions":
        end, warmup = self.decay_end, self.num_warmup_steps
        if self.lr_decay_style != "constant" and warmup > end:
            raise ValueError(f"the warm-up of {warmup} steps is longer than the run's decay, which ends at step {end}")
        if self.lr_wsd_decay_iters is not None and self.lr_wsd_decay_iters > end - warmup:
            raise ValueError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters} exceeds the {end - warmup} steps after the warm-up"
            )
        return self


def group_options(options: type[BaseModel], titles: Mapping[type[BaseModel], str]) -> None:
    """Let `--help` show the options of each part under a title, in this order."""
    for section, title in titles.items():
        group = Group.create_ordered(title)
        for name in section.model_fields:
            options.model_fields[name].metadata.append(Parameter(group=group))


group_options(
    TrainOptions,
    {
        FileOptions: "Files",
        RecipeOptions: "Recipe",
        PlanOptions: "Questions",
        LaunchOptions: "Processes",
        ParallelOptions: "Layout",
        BatchOptions: "Batch",
        OptimizerOptions: "Optimizer",
        LoraOptions: "LoRA",
        MemoryOptions: "Memory and speed",
        CheckpointOptions: "Checkpoints",
        WatchOptions: "Watching",
        ForeignOptions: "Accepted and answered",
    },
)
