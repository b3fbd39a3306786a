#!/usr/bin/env bash
# Sets everything up, then reshards a real 8-way checkpoint to 4 ranks under msrun on the CPU, and merges it.
# Every byte is compared with what MindSpore itself cut. Needs Python 3.9 to 3.12 with pip.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
cd "$ROOT"
golden=tests/data/golden
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

echo "Source: data parallel 2, tensor parallel 4, optimizer sharding: 8 ranks, weights and Adam states."
echo "Target: tensor parallel 4: 4 ranks."
for mode in direct cooperative; do
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  if ! GLOG_v=3 msrun --worker_num=4 --local_worker_num=4 --master_port="$port" --cluster_time_out=60 \
    --log_dir="$work/$mode" --join=True scripts/demo/load.py "$golden/dp2_tp4_zero/shards" \
    "$golden/dp2_tp4_zero/strategy.ckpt" "$golden/tp4/strategy.ckpt" "$golden/tp4/shards" "$mode" \
    >"$work/msrun.log" 2>&1; then
    tail -n 30 "$work/msrun.log" "$work/$mode"/worker_*.log >&2
    exit 1
  fi
  grep -h '^DEMO' "$work/$mode"/worker_*.log | cut -d ' ' -f 2-
done
python scripts/demo/merge.py "$golden/dp2_tp4_zero/shards" "$golden/dp2_tp4_zero/strategy.ckpt" \
  "$work/merged" "$golden/full/model.safetensors" | cut -d ' ' -f 2-
echo "Done: 8 to 4 ranks in two modes, and merged; not a byte differs."
