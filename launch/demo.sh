#!/usr/bin/env bash
# The whole main job on pictures of shapes that pvtcap draws itself (`make demo`): shards, two ZeRO-2 workers, captions
# and their scores before and after training, the same with the photos hidden, captions for three pictures.
#
# Run it again and it goes on from where it was. `make clean` forgets it.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
export PYTHON=$python NPROC=2
pvtcap=("$python" -m pvtcap)
run=runs/shapes
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. Draw the pictures and write the shards (val shows compositions that train never does)"
for part in train:4000 val:300; do
    [ -f "data/shapes-${part%:*}/manifest.json" ] ||
        "${pvtcap[@]}" shards shapes --split "${part%:*}" --num-samples "${part#*:}" --out "data/shapes-${part%:*}"
done

say "2. Train: two workers, ZeRO-2, from nothing (DeepSpeed compiles its communication first, once)"
launch/local.sh train configs/shapes.yaml

say "3. The same model, shown grey pictures: what does it know without looking?"
[ -f $run/eval/blanked/scores.json ] ||
    launch/local.sh evaluate $run --data data/shapes-val --blank-photos --out $run/eval/blanked

say "4. Captions for three pictures"
mkdir -p $run/pictures
for number in 3 4 5; do
    tar --extract --to-stdout --file data/shapes-val/shapes-val-000000.tar "val-00000$number.jpg" \
        > "$run/pictures/picture-$number.jpg"
done
"${pvtcap[@]}" caption $run $run/pictures --sheet $run/captions.png

say "5. Scores on the 300 validation pictures, $((SECONDS - started)) seconds after the start"
last=$(printf '%s\n' $run/eval/step_* | tail -n 1)
"${pvtcap[@]}" compare "before training=$run/eval/step_00000000" "trained=$last" \
    "trained, photos hidden=$run/eval/blanked"
cat <<TEXT

Three pictures with captions:   $run/captions.png
More, beside their references:  $last/captions.png
Loss, scores and captions:      ${python%/*}/tensorboard --logdir $run
Caption your own picture:       ${python%/*}/pvtcap caption $run PICTURE.jpg
TEXT
