#!/usr/bin/env bash
# Train FlashI2V 1.3B. Every name below can be set from outside, and further options may follow:
#     NPROC_PER_NODE=4 GLOBAL_BATCH_SIZE=16 bash examples/flashi2v/1.3b/pretrain_ddp.sh --compile
# On several machines start it on each, with NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail

HERE=${HERE:-examples/flashi2v/1.3b}
MM_DATA=${MM_DATA:-$HERE/data.json}
MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_flashi2v.json}
SAVE=${SAVE:-./save}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6001}
TP=${TP:-1}
PP=${PP:-1}
VP=${VP:-1}
CP=${CP:-1}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-$((MICRO_BATCH_SIZE * NPROC_PER_NODE * NNODES / TP / PP / CP))}

LAUNCH=(
    --nproc-per-node "$NPROC_PER_NODE"
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
)
LAYOUT=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --virtual-pipeline-model-parallel-size "$VP"
    --context-parallel-size "$CP"
    --use-distributed-optimizer
)
TRAINING=(
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "${TRAIN_ITERS:-1000000}"
    --seed 1024
    --bf16
    --lr "${LR:-2e-5}"
    --min-lr "${LR:-2e-5}"
    --lr-decay-style constant
    --lr-warmup-init 0
    --lr-warmup-iters 0
    --adam-beta1 0.9
    --adam-beta2 0.999
    --adam-eps 1e-15
    --weight-decay 1e-2
    --clip-grad 1.0
    --clip-grad-ema-decay 0.99
    --use-ema
)
MEMORY=(
    --recompute-granularity full
    --recompute-method block
    --recompute-num-layers 0
    --recompute-skip-core-attention
    --recompute-num-layers-skip-core-attention "${RECOMPUTE_LAYERS:-22}"
)
OUTPUT=(
    --save "$SAVE"
    --load "${LOAD:-$SAVE}"
    --save-interval "${SAVE_INTERVAL:-1000}"
    --log-interval 1
    --tensorboard-log-interval 1
    --eval-interval "${EVAL_INTERVAL:-1000}"
    --eval-iters 10
)
if [[ -n ${WANDB_PROJECT:-} ]]; then
    OUTPUT+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_EXP_NAME:-flashi2v}" --wandb-save-dir "$SAVE")
fi

# exec: what is sent to this script reaches the launcher, which saves before it ends.
exec flashi2v-train --mm-data "$MM_DATA" --mm-model "$MM_MODEL" \
    "${LAUNCH[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${MEMORY[@]}" "${OUTPUT[@]}" "$@"
