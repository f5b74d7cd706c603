#!/usr/bin/env bash
# open_clip_torch 3.3.0 with torch 2.15.0: `open_clip_train` trains in one process on a CPU (`--device cpu`), and under
# torchrun with two of them ends before the first step: it names the CPU among the `device_ids` of
# DistributedDataParallel, which torch takes for GPUs only. So what several GPUs share cannot be tried without any.
# Seen on 2026-11-28:
#   1 process:   rc 0
#   2 processes: rc 1 ValueError: DistributedDataParallel device_ids and output_device arguments only work with
# Exits 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 \
  open_clip_torch==3.3.0 webdataset==0.2.86 pandas braceexpand ftfy 'numpy<2.4'
cd "$folder"
export CUDA_VISIBLE_DEVICES=
found=
for processes in 1 2; do
  code=0
  "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m open_clip_train.main --dataset-type synthetic --train-data none --train-num-samples 8 --batch-size 4 --epochs 1 \
    --model ViT-S-32 --precision fp32 --device cpu --workers 0 --save-frequency 0 --name "run$processes" \
    >"log$processes" 2>&1 || code=$?
  said=$(grep -o 'ValueError: DistributedDataParallel device_ids and output_device arguments only work with' \
    "log$processes" | head -1 || true)
  line="$processes: rc $code $said"
  echo "$line"
  found+="$line;"
done
[[ $found == "1: rc 0 ;2: rc 1 ValueError: DistributedDataParallel device_ids and output_device arguments only work with;" ]]
