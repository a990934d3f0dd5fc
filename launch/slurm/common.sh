# What job scripts do around their trainers; sourced by them. Needs LAUNCH_DIR and PYTHON, and a function tell_trainers.
# shellcheck shell=bash

stopping='' trainers='' teller='' interrupted='' decision=''
trap hear USR1 TERM

# One directory an attempt, and the nodes' roles. Ends the job when its attempts make no progress.
begin_attempt() {
    ATTEMPT_DIR=$("$PYTHON" -m launch.cluster.attempt begin --launch_dir="$LAUNCH_DIR") || exit
    # shellcheck source=/dev/null
    source "$ATTEMPT_DIR/job.env"
    echo "attempt $ATTEMPT_DIR: $MEGATRON_SD_WORLD_SIZE ranks on $TRAINER_HOSTS, meeting at $MASTER_ADDR:$MASTER_PORT"
}

# on_nodes a,b COMMAND...: one task on each node; --ntasks, or the job's SLURM_NTASKS would start more on fewer nodes. --wait: when the first node has ended, the others get this long; killing them at
# once could end a rank that is still saving, and would replace its exit code. For the background only: it becomes srun.
on_nodes() {
    local hosts=$1 num_nodes
    num_nodes=$(tr ',' '\n' <<< "$hosts" | wc -l)
    shift
    trap '' USR1 # until srun has its own handler
    exec srun --nodes="$num_nodes" --ntasks="$num_nodes" --nodelist="$hosts" --ntasks-per-node=1 --overlap \
        --kill-on-bad-exit=0 --wait=90 "$@"
}

# on_all_nodes SCRIPT: one task on each node, ended together when one fails.
on_all_nodes() {
    srun --ntasks-per-node=1 --overlap --kill-on-bad-exit=1 bash "$1"
}

# Runs "$@" in the background and waits for it; its exit code is then in `code`: 85 at once when the job was told to stop before.
supervise() {
    local status
    if [ -n "$stopping" ]; then
        code=85
        return
    fi
    "$@" &
    trainers=$!
    [ -z "$stopping" ] || hear
    while true; do
        interrupted=
        wait "$trainers"
        status=$?
        [ "$status" = 127 ] && break # it had ended while a signal was handled; `code` is its own
        code=$status
        [ -n "$interrupted" ] || break
    done
    trainers=
    [ -z "$teller" ] || kill "$teller" 2>/dev/null
    teller=
}

# The job's signals: SIGUSR1 when the time is nearly up, and SIGTERM when it is preempted, at any moment.
hear() {
    interrupted=1
    stopping=1
    if [ -n "$trainers" ] && [ -z "$teller" ]; then
        tell_until_gone &
        teller=$!
    fi
}

# Again and again: a rank that is still importing has no handler yet.
tell_until_gone() {
    trap - USR1 TERM
    echo "told to stop: the ranks save and end with exit code 85"
    while kill -0 "$trainers" 2>/dev/null; do
        tell_trainers
        sleep 15
    done
}

# Sets `decision` to done, requeue or stop.
end_attempt() {
    decision=$("$PYTHON" -m launch.cluster.attempt end --launch_dir="$LAUNCH_DIR" --exit_code="$code") || decision=stop
}

# Ends a SLURM job: back into the queue, or for good.
leave_job() {
    if [ "$decision" = requeue ]; then
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # which SLURM cuts short
    fi
    [ "$decision" = "done" ] || exit "$((code == 0 ? 1 : code))"
}
