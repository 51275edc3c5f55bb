#!/usr/bin/env bash
# Sample the videos that inference_model.json asks for; further options may follow.
set -euo pipefail

exec flashi2v-infer --mm-model "${MM_MODEL:-examples/flashi2v/1.3b/inference_model.json}" "$@"
