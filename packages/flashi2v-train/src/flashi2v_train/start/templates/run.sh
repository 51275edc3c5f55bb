#!/usr/bin/env bash
# From videos to a model and a video of it. Interrupted, or with more STEPS, start it again: it goes on where it was.
set -euo pipefail
cd {{ here | quote }} # the paths in these files begin here
RUN={{ run | quote }}
DEVICE={{ devices.kind }} PROCESSES={{ devices.number }}
STEPS={{ steps }}
{% for download in base.downloads %}
[ -e {{ download.place | quote }} ] || {{ download.command }} # {{ download.what }}, {{ download.size }}
{% endfor %}

# 1. Which clips fit. $RUN/store/report.txt says why others do not; to change filter.yaml, remove $RUN/store first.
if ! ls -d "$RUN"/store/filtered_samples_*.lmdb > /dev/null 2>&1; then
  flashi2v-data filter --filter_config "$RUN/filter.yaml" --resume
fi

# 2. Clips and captions are encoded once, so that training needs neither the VAE nor the text encoder.
flashi2v-encode --mm-model "$RUN/model.json" --mm-data "$RUN/data.json" --output "$RUN/features" \
  --device "$DEVICE" --nproc-per-node "$PROCESSES"

# 3. Training. Meanwhile: flashi2v-train status $RUN/train
flashi2v-train --mm-model "$RUN/model.json" --mm-data "$RUN/data.json" --save "$RUN/train" \
  --device "$DEVICE" --nproc-per-node "$PROCESSES" --train-iters "$STEPS" \
  --micro-batch-size {{ fit.micro_batch }} --global-batch-size {{ batch }}{{ fit.saving.options | words }} \
{% if lora %}
 {{ lora | words }} \
{% endif %}
  --lr {{ "%g" % pace.rate }} --lr-warmup-iters {{ [pace.warmup, steps] | min }} \
{% if pace.projection != 1 %}
  --proj-lr-scale {{ pace.projection }} \
{% endif %}
{% if keeps_average %}
  --ema-decay {{ pace.ema_decay }} \
{% endif %}
{% if held_out %}
  --eval-interval {{ often }} --eval-iters {{ (held_out / fit.micro_batch) | round(method="ceil") | int }} \
  --eval-videos {{ [2, held_out] | min }} \
{% endif %}
  --save-interval {{ often }} --keep-checkpoints 2 --log-interval 1

{% if writes_model %}
# 4. A model directory for flashi2v-infer.
if [ "$RUN/train/latest_checkpointed_iteration.txt" -nt "$RUN/model" ]; then
  rm -rf "$RUN/model"
  flashi2v-model convert "$RUN/train" "$RUN/model" --to diffusers --encoders {{ base.encoders | quote }}
{%- if not keeps_average %} --weights raw{% endif %}
{% if base.is_small %} --shift 3{% endif +%}
fi

{% endif %}
{% if lora and not base.is_trunk %}
# 4. The adapter, for flashi2v-infer --lora and pipe.load_lora_weights, and as ComfyUI spells it.
rm -f "$RUN/lora.safetensors" "$RUN/lora-comfyui.safetensors"
flashi2v-model convert "$RUN/train" "$RUN/lora.safetensors" --to diffusers
flashi2v-model convert "$RUN/train" "$RUN/lora-comfyui.safetensors" --to comfyui

{% endif %}
# 5. A video from the first frame of a clip that was held out, and its film strip.
sample=(flashi2v-infer --model {% if writes_model %}"$RUN/model"{% else %}{{ base.encoders | quote }} --lora "$RUN/lora.safetensors"{% endif %}
 --image "$RUN/first_frame.png" --prompt {{ prompt | quote }} \
  --num-frames {{ num_frames }} --height {{ limits.sample_height }} --width {{ limits.sample_width }} --fps {{ "%g" % limits.train_fps }} --device "$DEVICE"
{%- if base.is_small %} --num-inference-steps 25 --guidance-scale 1{% endif %})
rm -f "$RUN/sample.mp4" "$RUN/sample.json" "$RUN/sample.png"
"${sample[@]}" -o "$RUN/sample.mp4" --strip "$RUN/sample.png"
echo
flashi2v-train status "$RUN/train"
echo
echo "$RUN/sample.mp4 and $RUN/sample.png are made by this; give it your own image and prompt:"
printf ' %q' "${sample[@]}" -o "$RUN/sample.mp4"
echo
