#!/usr/bin/env bash
# The demonstration itself, with the Python, msrun and ms_ckpt_ext that are on PATH: run.sh GOLDEN WORK
# GOLDEN is tests/data/golden or a copy of it; results and logs go into the folder WORK.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" golden=$1 work=$2

for mode in direct cooperative; do
  mkdir -p "$work/$mode"
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  if ! GLOG_v=3 msrun --worker_num=4 --local_worker_num=4 --master_port="$port" --cluster_time_out=60 \
    --log_dir="$work/$mode" --join=True "$here/load.py" "$golden/dp2_tp4_zero/shards" \
    "$golden/dp2_tp4_zero/strategy.ckpt" "$golden/tp4/strategy.ckpt" "$golden/tp4/shards" "$mode" \
    >"$work/msrun.log" 2>&1; then
    find "$work/msrun.log" "$work/$mode" -name '*.log' -exec tail -n 30 {} + >&2 # a rank that did not start has none
    exit 1
  fi
  grep -h '^DEMO' "$work/$mode"/worker_*.log | cut -d ' ' -f 2-
done
python "$here/merge.py" "$golden/dp2_tp4_zero/shards" "$golden/dp2_tp4_zero/strategy.ckpt" \
  "$work/merged" "$golden/full/model.safetensors" | cut -d ' ' -f 2-
