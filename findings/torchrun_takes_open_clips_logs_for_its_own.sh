#!/usr/bin/env bash
# torchrun of torch 2.15.0 ends with "ambiguous option" at arguments that are the script's, not its own: its parser
# looks for abbreviations of its options in everything that follows, after the script's name, too. open_clip_train's
# `--logs DIR` is one of them (`--logs-specs` and `--logs_specs` begin with it), so the command that is documented for
# several GPUs cannot be given that option. `--name` is handed on. Settings in a file or in the environment are safe.
# Seen on 2026-11-28:
#   --logs rc 2 ambiguous option: --logs could match --logs-specs, --logs_specs
#   --name rc 0 ['--name', 'here']
# Exits 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 'numpy<2.4'
printf 'import sys\nprint(sys.argv[1:])\n' >"$folder/show.py"
export CUDA_VISIBLE_DEVICES=
found=
for option in --logs --name; do
  code=0
  said=$("$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 "$folder/show.py" \
    "$option" here 2>&1) || code=$?
  last=$(tail -1 <<<"$said")
  line="$option rc $code ${last#run.py: error: }"
  echo "$line"
  found+="$line;"
done
[[ $found == "--logs rc 2 ambiguous option: --logs could match --logs-specs, --logs_specs;--name rc 0 ['--name', 'here'];" ]]
