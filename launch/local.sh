#!/usr/bin/env bash
# Run any pvtcap command on this machine with NPROC processes (default: one a GPU, or 1):
#
#     NPROC=8 launch/local.sh train configs/flickr30k.yaml optim.lr=1e-4
#
# The words behind the script are pvtcap's own. Each process gets its share of the cores. With MAX_RESTARTS=3 the
# processes are started again up to three times when one of them was killed; training goes on from its last checkpoint.
set -euo pipefail

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || [ -n "${PYTHON:-}" ] || python=python3
if [ -z "${NPROC:-}" ]; then
    NPROC=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    [ "$NPROC" -gt 0 ] || NPROC=1
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

if [ "$NPROC" -eq 1 ] && [ -z "${MAX_RESTARTS:-}" ]; then
    exec "$python" -m pvtcap "$@"
fi
# --standalone finds free ports, and torchrun.py keeps them: two runs on one machine never meet.
exec "$python" "$here/torchrun.py" --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" \
    -m pvtcap "$@"
