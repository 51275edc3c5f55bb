"""What `--dry-run` prints."""

import json
from dataclasses import fields

from flashi2v_train.buckets import describe_buckets
from flashi2v_train.config import RunConfig
from flashi2v_train.cost import Memory, count_parameters, count_recomputed, num_tokens, operations_of, predict
from flashi2v_train.downloads import find_missing, hub_ids
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.splits import bubble
from flashi2v_train.start.memory import describe_cards

_GIB = 2**30


def missing_files(config: RunConfig) -> str | None:
    """Return which files of the run are not here, what they are, how large, and where from; None where all are."""
    missing = find_missing(config, num_parameters=sum(count_parameters(config).values()))
    if not missing:
        return None
    lines = [f"missing      {len(missing)} of the files and directories that a run needs"]
    for item in missing:
        lines += [f"  {item.key} = {item.path}", f"    {item.what}, {item.size}", f"    from: {item.source}"]
    return "\n".join(lines)


def describe_run(config: RunConfig, dims: ParallelDims) -> str:
    """Return what `--dry-run` prints."""
    options, resolved = config.options, json.dumps(config.as_dict(), indent=1)  # as it would be written to config.json
    several = config.data.dataset_param.buckets is not None
    buckets = describe_buckets(config, dims) if several else []
    config = max(config.kinds, key=num_tokens)  # of the others no more tokens are computed at a time
    operations = operations_of(config)
    micro_batches = config.micro_batches(dims)
    samples = micro_batches * options.micro_batch_size * dims.data
    lines = [
        resolved,
        "",
        f"parallel     {dims.describe()}" + (f"; {dims.world_size} processes" if dims.world_size > 1 else ""),
        f"batch        samples per step: {samples} = {dims.data} (data parallel) x {micro_batches} (micro batches) x "
        f"{options.micro_batch_size} (micro batch size)"
        + (f"; those of {config.data.dataset_param.main_bucket}, of others more" if several else ""),
        *buckets,
        f"tokens       {num_tokens(config)} per sample, latents (C, F, H, W) = {config.latent_shape}",
        f"operations   {operations.training / 1e12:.4g} TFLOPs per sample, "
        f"{operations.training * samples / 1e12:.4g} per step, forward and backward",
        "parameters   "
        + ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in count_parameters(config).items()),
    ]
    again = count_recomputed(config, dims)
    if again:
        lines.append(
            f"recompute    {again / 1e12:.4g} TFLOPs per sample more, {again / operations.training:.0%}, to save memory"
        )
    if dims.pipeline > 1:
        share = bubble(dims.pipeline, micro_batches, dims.num_stages // dims.pipeline)
        lines.append(f"bubble       {share:.1%} of a step in theory, if all stages take equally long")
    kinds = [field.name for field in fields(Memory)]
    lines += ["", f"{'GiB per process':<16}{'parameters':>12}" + "".join(f"{kind:>13}" for kind in [*kinds, "total"])]
    for rank, cost in enumerate(predict(config, dims)):
        name = "all" if dims.pipeline == 1 else f"stage {', '.join(map(str, dims.stages_of(rank)))}"
        sizes = [getattr(cost.memory, kind) / _GIB for kind in [*kinds, "total"]]
        lines.append(f"{name:<16}{cost.parameters / 1e6:>10.1f} M" + "".join(f"{size:>13.2f}" for size in sizes))
    lines.append("activations are what autograd keeps; kernels' own memory and the frozen encoders come on top")
    if options.trains_adapters and dims.world_size == 1:
        lines += ["", describe_cards(config)]
    lines += [f"{name} is no directory here: it is looked up on the hub at the start" for name in hub_ids(config)]
    return "\n".join(lines)
