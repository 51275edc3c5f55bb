"""The files of a run, as the reference has them, short and commented: filter.yaml, data.json, model.json, run.sh."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashi2v_data.curation.config import FilterConfig
from flashi2v_model.config import PredictorConfig
from flashi2v_train.start.base import Base

_LORA_RATES = (1e-4, 2e-3)  # of a large model, of a small one


@dataclass(frozen=True)
class Plan:
    """All that the files say.

    Attributes:
        run: their directory, as the user named it.
        base: what to start from.
        limits: of the filter.
        frames: of a sample.
        mixes: the data have buckets.
        text_length: tokens of a caption.
        held_out: clips kept from training.
        device: kind of device.
        processes: devices.
        batch: samples of a step.
        steps: of training.
        image: first frame to sample from.
        prompt: of that.
        lora: options of adapters; none where all weights are trained.
    """

    run: Path
    base: Base
    limits: FilterConfig
    frames: int
    mixes: bool
    text_length: int
    held_out: int
    device: str
    processes: int
    batch: int
    steps: int
    image: Path
    prompt: str
    lora: dict[str, Any]

    @property
    def writes_model(self) -> bool:
        """Whether what is trained becomes a whole model, and not an adapter of one that is here."""
        return not (self.lora and self.base.samples)

    @property
    def dtype(self) -> str:
        """What the transformer computes in; few CPUs have bf16."""
        return "fp32" if self.device == "cpu" else "bf16"


def filter_yaml(plan: Plan) -> str:
    """Return the contents of filter.yaml."""
    limits = plan.limits
    lines = [
        "# Which clips are trained on: flashi2v-data filter --filter_config " + str(plan.run / "filter.yaml"),
        f"ann_txt_path: {json.dumps(limits.ann_txt_path)} # lines of: root of the videos, meta JSON",
        f"save_path: {json.dumps(limits.save_path)} # the LMDB, and report.txt on what was dropped, and why",
        f"sample_height: {limits.sample_height}",
        f"sample_width: {limits.sample_width}",
        f"sample_num_frames: {limits.sample_num_frames}",
        f"min_hxw: {limits.min_hxw} # least pixels at the sample's shape; smaller ones would be blown up",
        f"train_fps: {limits.train_fps:g} # slower clips are dropped",
        f"max_h_div_w_ratio: {limits.max_h_div_w_ratio} # of other shapes more than half would be cropped away",
        f"min_h_div_w_ratio: {limits.min_h_div_w_ratio}",
        f"too_long_factor: {limits.too_long_factor:g} # of a longer clip, one part of sample_num_frames is used",
        f"text_tokenizer_path: {json.dumps(plan.base.paths['tokenizer'])} # counts captions that it cannot read",
        f"tokenizer_max_length: {plan.text_length}",
    ]
    if plan.base.downloads:  # filtering need not wait for the tokenizer
        lines = lines[:-2]
    return "\n".join(lines) + "\n"


def data_json(plan: Plan) -> str:
    """Return the contents of data.json."""
    limits = plan.limits
    size = f"[{limits.sample_height}, {limits.sample_width}]"
    words = "each clip where it is cropped least; none is larger or longer than this sample"
    buckets = f'\n        "buckets": "auto", # {words}' if plan.mixes else ""
    return f"""# What is trained on, and how it is read.
{{
    "dataset_param": {{
        "dataset_type": "flashi2v",
        "metafile_or_dir_path": {json.dumps(limits.save_path)}, # what flashi2v-data filter wrote
        "held_out_clips": {plan.held_out}, # never trained on: validation looks at them
        "load_video_features": true, # encoded once, ahead of training
        "load_text_features": true,
        "features_path": {json.dumps(str(plan.run / "features"))}, # what flashi2v-encode wrote
        "text_tokenizer_path": {json.dumps(plan.base.paths["tokenizer"])},
        "sample_height": {limits.sample_height},
        "sample_width": {limits.sample_width},
        "sample_num_frames": {plan.frames},{buckets}
        "train_fps": {limits.train_fps:g},
        "text_drop_ratio": 0.1, # so that sampling may weigh the prompt (guidance)
        "tokenizer_max_length": {plan.text_length},
        "return_prompt_mask": true,
        "transform_pipeline": {{
            "video": [
                {{"trans_type": "CenterCropResizeVideo", "param": {{"transform_size": {size}}}}},
                {{"trans_type": "ToTensorVideo"}},
                {{"trans_type": "norm_fun", "param": {{"mean": 0.5, "std": 0.5}}}}
            ]
        }}
    }},
    "dataloader_param": {{
        "dataloader_mode": "sampler",
        "sampler_type": "StatefulDistributedSampler",
        "collate_param": {{"model_name": "flashi2v"}},
        "shuffle": true,
        "drop_last": true,
        "pin_memory": true,
        "num_workers": 1 # features are quick to read
    }}
}}
"""


def model_json(plan: Plan) -> str:
    """Return the contents of model.json."""
    base = plan.base
    defaults = {name: field.default for name, field in PredictorConfig.model_fields.items()}
    shown = ("hidden_size", "ffn_dim", "num_heads", "num_layers", "text_dim")
    settings = base.predictor | {"text_len": plan.text_length}
    chosen = {name: value for name, value in settings.items() if name in shown or value != defaults[name]}
    lines = ",\n".join(f"        {json.dumps(name)}: {json.dumps(value)}" for name, value in chosen.items())
    dtype = "fp32" if plan.base.is_small or plan.device == "cpu" else "bf16"
    guidance = '\n        "guidance_scale": 1.0, # of validation\n        "shift": 3.0,' if base.is_small else ""
    return f"""# What is trained, and the parts around it. It starts from {base.name}.
{{
    "load_video_features": true,
    "load_text_features": true,
    "task": "t2v",
    "ae": {{
        "model_id": "wan_video_vae",
        "from_pretrained": {json.dumps(base.paths["vae"])},
        "dtype": "fp32",
        "do_sample": {json.dumps(not base.is_small)}
    }},
    "text_encoder": {{
        "model_id": "UMT5",
        "from_pretrained": {json.dumps(base.paths["text_encoder"])},
        "dtype": "{dtype}"
    }},
    "diffusion": {{
        "model_id": "flow_matching",{guidance}
        "use_dynamic_shifting": true,
        "use_logitnorm_time_sampling": true
    }},
    "predictor": {{
        "model_id": "flashi2vdit",
        "from_pretrained": {json.dumps(base.paths["transformer"])},
        "dtype": "{plan.dtype}",
        "low_freq_energy_ratio": [0.05, 0.95],
{lines}
    }}
}}
"""


def run_sh(plan: Plan, saving: list[str], micro_batch: int) -> str:
    """Return the contents of run.sh.

    Args:
        plan: of the run.
        saving: options that save memory.
        micro_batch: samples of a device at a time.
    """
    base, limits = plan.base, plan.limits
    rate, warmup, decay, projection = (5e-4, 20, 0.98, 5) if base.is_small else (1e-5, 100, 0.999, 1)
    if plan.lora:
        rate, projection = _LORA_RATES[base.is_small], 1
    train = [
        ['--mm-model "$RUN/model.json" --mm-data "$RUN/data.json" --save "$RUN/train"'],
        ['--device "$DEVICE" --nproc-per-node "$PROCESSES" --train-iters "$STEPS"'],
        [f"--micro-batch-size {micro_batch} --global-batch-size {plan.batch}", *saving],
        as_words(plan.lora),
        [f"--lr {rate:g} --lr-warmup-iters {min(warmup, plan.steps)}"],
        [f"--proj-lr-scale {projection}"] if projection != 1 else [],
        [] if "--no-use-ema" in saving else [f"--ema-decay {decay}"],
        [f"--save-interval {max(1, plan.steps // 4)} --keep-checkpoints 2 --log-interval 1"],
        [f"--eval-interval {max(1, plan.steps // 4)} --eval-iters {-(-plan.held_out // micro_batch)}"]
        if plan.held_out
        else [],
        [f"--eval-videos {min(2, plan.held_out)}"] if plan.held_out else [],
    ]
    options = " \\\n  ".join(" ".join(words) for words in train if words)
    model = '"$RUN/model"' if plan.writes_model else f'{shlex.quote(base.encoders)} --lora "$RUN/lora.safetensors"'
    sample = (
        f'flashi2v-infer --model {model} --image "$RUN/{plan.image.name}" --prompt {shlex.quote(plan.prompt)} \\\n'
        f"  --num-frames {plan.frames} --height {limits.sample_height} --width {limits.sample_width} "
        f'--fps {limits.train_fps:g} --device "$DEVICE"'
    )
    sample += " --num-inference-steps 25 --guidance-scale 1" if base.is_small else ""
    downloads = "".join(
        f"[ -e {shlex.quote(_place(command))} ] || {command} # {what}, {size}\n"
        for command, what, size in base.downloads
    )
    raw = " --weights raw" if "--no-use-ema" in saving else ""
    shift = " --shift 3" if base.is_small else ""
    made = [f"""# 4. A model directory for flashi2v-infer.
if [ "$RUN/train/latest_checkpointed_iteration.txt" -nt "$RUN/model" ]; then
  rm -rf "$RUN/model"
  flashi2v-model convert "$RUN/train" "$RUN/model" --to diffusers --encoders {shlex.quote(base.encoders)}{raw}{shift}
fi"""] if plan.writes_model else []  # fmt: skip
    if plan.lora and not base.is_trunk:
        made.append("""# 4. The adapter, for flashi2v-infer --lora and pipe.load_lora_weights, and as ComfyUI spells it.
rm -f "$RUN/lora.safetensors" "$RUN/lora-comfyui.safetensors"
flashi2v-model convert "$RUN/train" "$RUN/lora.safetensors" --to diffusers
flashi2v-model convert "$RUN/train" "$RUN/lora-comfyui.safetensors" --to comfyui""")
    files = "\n\n".join(made)
    return f"""#!/usr/bin/env bash
# From videos to a model and a video of it. Interrupted, or with more STEPS, start it again: it goes on where it was.
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))} # the paths in these files begin here
RUN={shlex.quote(str(plan.run))}
DEVICE={plan.device} PROCESSES={plan.processes}
STEPS={plan.steps}
{downloads}
# 1. Which clips fit. $RUN/store/report.txt says why others do not; to change filter.yaml, remove $RUN/store first.
if ! ls -d "$RUN"/store/filtered_samples_*.lmdb > /dev/null 2>&1; then
  flashi2v-data filter --filter_config "$RUN/filter.yaml" --resume
fi

# 2. Clips and captions are encoded once, so that training needs neither the VAE nor the text encoder.
flashi2v-encode --mm-model "$RUN/model.json" --mm-data "$RUN/data.json" --output "$RUN/features" \\
  --device "$DEVICE" --nproc-per-node "$PROCESSES"

# 3. Training. Meanwhile: flashi2v-train status $RUN/train
flashi2v-train {options}

{files}

# 5. A video from the first frame of a clip that was held out, and its film strip.
sample=({sample})
rm -f "$RUN/sample.mp4" "$RUN/sample.json" "$RUN/sample.png"
"${{sample[@]}}" -o "$RUN/sample.mp4" --strip "$RUN/sample.png"
echo
flashi2v-train status "$RUN/train"
echo
echo "$RUN/sample.mp4 and $RUN/sample.png are made by this; give it your own image and prompt:"
printf ' %q' "${{sample[@]}}" -o "$RUN/sample.mp4"
echo
"""


def _place(command: str) -> str:
    """Return what a download leaves: the part's directory."""
    words = shlex.split(command)
    part = words[words.index("--include") + 1].removesuffix("/*")
    return str(Path(words[words.index("--local-dir") + 1]) / part)


def as_options(plan: Plan, files: Path) -> dict[str, Any]:
    """Return the options under which the run is checked before anything is written under its name."""
    return {
        "mm_model": files / "model.json",
        "mm_data": files / "data.json",
        "save": plan.run / "train",
        "dry_run": True,
        "nproc_per_node": plan.processes,
        "global_batch_size": plan.batch,
        **plan.lora,
    }


def as_words(options: dict[str, Any]) -> list[str]:
    """Return options of `flashi2v-train` as one types them."""
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            each = value if isinstance(value, list) else [value]
            words += [f"--{option} {shlex.quote(str(one))}" for one in each]
    return words
