#!/usr/bin/env bash
# Proves and measures the package on a GPU, from a bare checkout with the packages that are there.
#
#   benchmarks/cuda/run.sh STEP [OUTPUT]      STEP: correct | speed | flagship | table
#
# Each step takes at most some four minutes on an H100 and writes JSON into OUTPUT (benchmarks/results/cuda) as it goes,
# so let OUTPUT be what you keep. Nothing else should run beside `speed`. What the
# machine lacks can lie as wheels in $WHEELS and is unpacked into $SITE. `flagship` needs what
# examples/smollm2_emoji/prepare_flagship.py writes, in $DATA, and trains for $SECONDS_TO_TRAIN.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=${1:?one of correct, speed, flagship, table}
output=$(mkdir -p "${2:-benchmarks/results/cuda}" && cd "${2:-benchmarks/results/cuda}" && pwd)
site=${SITE:-/tmp/transformers-liquid-site}
if [ -n "${WHEELS:-}" ] && [ ! -d "$site" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
case $step in
  correct)
    rm -f "$output/correct.jsonl"
    FACTS="$output/correct.jsonl" python3 -m pytest tests/test_cuda.py -q -p no:cacheprovider -rA --tb=short \
      2>&1 | tee "$output/correct.log" | grep -vE '^(PASSED|tests/)' ;;
  speed)
    for part in ${PARTS:-gemma-1 emoji gemma-16 training}; do
      timeout "${PART_SECONDS:-120}" python3 benchmarks/cuda/speed.py $part --output "$output" 2>&1 \
        | tee "$output/$part.log" || echo "$part did not finish"
    done ;;
  flagship)
    data=${DATA:-liquid-smollm2}
    python3 - "$data" <<'PYTHON'
import sys; sys.path.append("examples/smollm2_emoji")
from pathlib import Path
from prepare import build_base
if not (Path(sys.argv[1]) / "base").exists():
    build_base(Path(sys.argv[1]) / "base")
PYTHON
    python3 examples/smollm2_emoji/train_flagship.py --data_dir "$data" --output_dir "$output/adapter" \
      --seconds "${SECONDS_TO_TRAIN:-300}" ${TRAIN_OPTIONS:-} 2>&1 | tee "$output/flagship.log"
    python3 examples/smollm2_emoji/evaluate_flagship.py --data_dir "$data" --adapter "$output/adapter" \
      --output "$output/flagship" --limit "${LIMIT:-1500}" 2>&1 | tee "$output/flagship-evaluation.log" ;;
  table)
    python3 benchmarks/cuda/table.py "$output" ;;
  *) echo "unknown step $step" >&2; exit 2 ;;
esac
