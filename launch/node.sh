#!/usr/bin/env bash
# What slurm/*.sbatch starts once on each node, through srun: any pvtcap command, on all GPUs of all nodes.
#
#     srun launch/node.sh train configs/coco.yaml
#
# NPROC: processes a node, instead of one a GPU (or one). NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME: the network to use,
# where a node has several; docs/slurm.md. launch/slurmnode.py does the rest: this must stay small, since a signal that
# comes while it runs is lost.
set -euo pipefail
trap '' USR1

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || [ -n "${PYTHON:-}" ] || python=python3
exec "$python" "$here/slurmnode.py" "$@"
