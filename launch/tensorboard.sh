#!/usr/bin/env bash
# TensorBoard of a folder of runs (default: runs), on this machine or, started by srun, on a compute node:
#
#     launch/tensorboard.sh [runs]
#
# PORT is 6006 by default, under Slurm one of the job's own.
set -euo pipefail
here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || [ -n "${PYTHON:-}" ] || python=python3
job=${SLURM_JOB_ID:-0}
port=${PORT:-$((job ? 6007 + job % 20000 : 6006))}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    echo "On your own machine: ssh -N -L 6006:$(hostname):$port ${SLURM_SUBMIT_HOST:-LOGIN_NODE}"
    echo "and then open http://localhost:6006"
    exec "$python" -m tensorboard.main --logdir "${1:-runs}" --port "$port" --bind_all
fi
exec "$python" -m tensorboard.main --logdir "${1:-runs}" --port "$port"
