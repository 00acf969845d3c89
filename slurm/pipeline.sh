#!/usr/bin/env bash
# From photos to scores as one submission: shards, features, training, evaluation, each after the one before.
#
#     SHARDS="flickr8k --images images --captions Flickr8k.token.txt" \
#     TRAIN_LIST=Flickr_8k.trainImages.txt VAL_LIST=Flickr_8k.devImages.txt \
#     slurm/pipeline.sh configs/flickr8k_tiny.yaml DATA [section.key=value …]
#
# DATA gets train/ and val/, and with FEATURES=1 (a frozen encoder) train-features/ and val-features/; the run folder is
# DATA/run and the scores of val are in DATA/scores. SBATCH_OPTIONS go to each job; NODES is for all but the shards.
set -euo pipefail
config=${1:?a configuration} data=${2:?a folder to build in}
shift 2
here=$(dirname "$0")
nodes=(--nodes "${NODES:-1}")

submit() { # dependency, then sbatch's words
    local after=$1
    shift
    # shellcheck disable=SC2086  # options are words
    sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency "afterok:$after"} ${SBATCH_OPTIONS:-} "$@"
}

# shellcheck disable=SC2086
train=$(submit "" "$here/shards.sbatch" $SHARDS --list "$TRAIN_LIST" --out "$data/train")
# shellcheck disable=SC2086
val=$(submit "" "$here/shards.sbatch" $SHARDS --list "$VAL_LIST" --out "$data/val")
last=$train:$val from=""
if [ -n "${FEATURES:-}" ]; then
    train=$(submit "$last" "${nodes[@]}" "$here/features.sbatch" "$config" --data "$data/train" --out "$data/train-features" "$@")
    val=$(submit "$last" "${nodes[@]}" "$here/features.sbatch" "$config" --data "$data/val" --out "$data/val-features" "$@")
    last=$train:$val from=-features
fi
last=$(submit "$last" "${nodes[@]}" "$here/train.sbatch" "$config" "run.dir=$data/run" \
    "data.train=$data/train$from" "data.val=$data/val$from" "$@")
last=$(submit "$last" "${nodes[@]}" "$here/evaluate.sbatch" "$data/run" --data "$data/val$from" --out "$data/scores")
echo "$last"
