# What the sbatch files of this folder share; they source it. It finds Python, the nodes' addresses and the last checkpoint,
# and runs a command on every node so that the job goes on where it was when SLURM stops and requeues it.
#
# From the environment, all optional:
#   VENV        a virtual environment to activate (default: the active one, else .venv)
#   OUTPUT_DIR  the run's folder (default: runs/<job name>-<job id>); a new job with the folder of an old one goes on with it
#   SAVE_STEPS  a checkpoint every so many steps (default: 100)
#   PROCESSES   training processes on a node (default: the GPUs that the job has there, else 1)
#   MASTER_PORT default: from the job's number

set -euo pipefail

if [[ -n ${VENV:-} ]]; then
    source "$VENV/bin/activate"
elif [[ -z ${VIRTUAL_ENV:-} && -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi

OUTPUT_DIR=${OUTPUT_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
if [[ " $*" == *" --output_dir"* ]]; then
    echo "give the run's folder as OUTPUT_DIR=... in the environment, not as --output_dir: the checkpoint to resume from is looked for there"
    exit 2
fi

# Rank 0 runs on the first node. Its name need not resolve everywhere; NodeAddr is what SLURM itself reaches it by.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))} # below the ports that systems give out by themselves
# Since SLURM 22.05 srun does not take this over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# The newest checkpoint that is complete: a job may be killed while it saves.
FIND_CHECKPOINT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/checkpoints.py
last_checkpoint() { python "$FIND_CHECKPOINT" "$OUTPUT_DIR"; }

CHECKPOINT=$(last_checkpoint)
# Flags for examples/train.py: the same for the first start and for every later one. The last of two equal flags counts, so
# those on sbatch's command line come behind these.
TRAIN_FLAGS=(--output_dir "$OUTPUT_DIR" --save_strategy steps --save_steps "${SAVE_STEPS:-100}" --save_total_limit 2
    --resume_from_checkpoint auto --disable_tqdm True)

# Time is nearly up (#SBATCH --signal): back into the queue, unless this run got no further than where it began.
requeue() {
    if [[ "$(last_checkpoint)" == "$CHECKPOINT" ]]; then
        echo "time is nearly up and no new checkpoint was written: not requeued; make SAVE_STEPS smaller or --time longer"
    else
        echo "time is nearly up: back into the queue, to go on from $(last_checkpoint)"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
trap requeue USR1

# Run a command once on each node; it finds its node's number in SLURM_NODEID.
on_every_node() {
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes of $PROCESSES processes," \
        "rank 0 at $MASTER_ADDR:$MASTER_PORT, ${CHECKPOINT:+going on from }${CHECKPOINT:-from the beginning}"
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "$@" &
    local step=$! status=0
    # A trap ends `wait` before the step has ended.
    while kill -0 "$step" 2>/dev/null; do
        status=0
        wait "$step" || status=$?
    done
    # A preempted job's processes are told to stop some time before the job is requeued. If this script ended in between,
    # SLURM would count the job as failed and not requeue it; so it stays until SLURM ends it, at most ten minutes.
    if ((status != 0)) && ! scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=None'; then
        echo "preempted: waiting to be requeued"
        sleep 600
    fi
    return $status
}
