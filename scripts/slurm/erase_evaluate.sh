#!/bin/bash
# Erase, then paint the pictures of the evaluation in PARTS jobs at a time, then put the numbers together: three kinds of
# jobs, each after the one before has succeeded. It only submits; overrides as for `unpaint run`.
#   PARTS=8 SBATCH_PARTITION=long scripts/slurm/erase_evaluate.sh concept=cat method=esd evaluator=full trainer=cpu
# More options for sbatch, for all three: SBATCH_OPTIONS="--gpus-per-node=1"
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
parts=${PARTS:-4}
read -r -a options <<<"${SBATCH_OPTIONS:-}"

submit() { sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@"; }

erase=$(UNPAINT_COMMAND=erase submit "$here/run.sbatch" "$@")
# force=true is meant for the first: the others go on from what it made.
paint=$(submit --dependency="afterok:$erase" --array="1-$parts" "$here/paint_part.sbatch" "$parts" "$@" force=false)
score=$(submit --dependency="afterok:$paint" "$here/run.sbatch" "$@" force=false)
echo "erase $erase, paint $paint, score $score"
