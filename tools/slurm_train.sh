#!/usr/bin/env bash
# Trains under SLURM, one process per GPU, and goes on in a new job when time is up:
#
#     sbatch --nodes=8 tools/slurm_train.sh CONFIG [options of tools/train.py]
#
# from the folder of this repository, in its environment (or PYTHON=.venv/bin/python sbatch ...). Options of sbatch on
# the command line replace those below.
#
#SBATCH --job-name=densekit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# 120 to 180 seconds before time is up SLURM sends SIGTERM to the tasks of srun, not to this shell (that would be
# B:TERM@120). They save a checkpoint after the step they are at and end with status 75. Give more time where a step and
# a checkpoint need more.
#SBATCH --signal=TERM@120
# A job whose node fails is started again by SLURM itself. The log goes on in the same file.
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

stop() {
    echo "error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || stop 'this is no job of SLURM; start it with sbatch tools/slurm_train.sh CONFIG'
[ $# -gt 0 ] || stop 'no config; sbatch tools/slurm_train.sh CONFIG [options of tools/train.py]'
[ -f tools/train.py ] || stop "no tools/train.py in $PWD; submit from the folder of the repository"
for argument in "$@"; do
    case "$argument" in
        --resume*) stop "$argument: a job always resumes from its work folder, if there is something; leave it out" ;;
        --load-from*) stop "$argument would start anew after each requeue; give --cfg-options load_from=CKPT" ;;
    esac
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Newer versions of srun do not take --cpus-per-task over from sbatch. A process that ends must not have the others
# killed while they save, nor leave them waiting for long.
status=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=60 \
    "${PYTHON:-python}" tools/train.py "$@" --resume=auto || status=$?

if [ "$status" -eq 75 ]; then
    echo "Job $SLURM_JOB_ID was told to stop and has saved a checkpoint: it goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID" || echo 'error: it does not; submit the same command again' >&2
fi
exit "$status"
