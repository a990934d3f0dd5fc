#!/bin/bash
# Attempt after attempt on this machine, or on the machines of a hostfile over ssh, without a scheduler. Rendered by
# `sd-search launch`. SIGUSR1 or SIGTERM to this script: save, and end.
set -uo pipefail
cd @directory@ || exit
@setup@
export PYTHON=@python@ LAUNCH_DIR=@launch_dir@ MEGATRON_SD_JOB=$$-$SECONDS-$RANDOM
# shellcheck source=launch/slurm/common.sh
source "$LAUNCH_DIR/common.sh"

# One launcher a host, each the leader of a process group; the exit code is the largest. When one fails, the others get half a minute.
all_hosts() {
    trap '' USR1 TERM
    local rank=0 host code=0 status launcher
    local -a launchers=()
    for host in ${TRAINER_HOSTS//,/ }; do
        one_host "$host" "$rank" &
        launchers+=("$!")
        rank=$((rank + 1))
    done
    for launcher in "${launchers[@]}"; do
        wait "$launcher"
        status=$?
        [ "$status" -le "$code" ] || code=$status
    done
    return "$code"
}

one_host() {
    local status
    on_host "$1" "ATTEMPT_ENV=$ATTEMPT_DIR/job.env exec setsid --wait bash $LAUNCH_DIR/node.sh $2"
    status=$?
    [ "$status" = 0 ] || { sleep 30 && signal_hosts TERM; }
    return "$status"
}

# on_all_hosts SCRIPT: once on each host, with its name.
on_all_hosts() {
    local host code=0 process
    local -a processes=()
    for host in ${TRAINER_HOSTS//,/ }; do
        on_host "$host" "ATTEMPT_ENV=$ATTEMPT_DIR/job.env exec bash $1 $host" &
        processes+=("$!")
    done
    for process in "${processes[@]}"; do wait "$process" || code=1; done
    return "$code"
}

on_host() {
    @on_host@
}

signal_hosts() {
    local rank=0 host
    for host in ${TRAINER_HOSTS//,/ }; do
        on_host "$host" "kill -$1 -- -\$(cat $ATTEMPT_DIR/node-$rank.pid)" 2>/dev/null
        rank=$((rank + 1))
    done
}

tell_trainers() { signal_hosts USR1; }

while true; do
    begin_attempt
    code=0
    @doctor@
    [ "$code" != 0 ] || supervise all_hosts
    end_attempt
    if [ "$decision" != requeue ] || [ -n "$stopping" ]; then break; fi
done
[ "$decision" = "done" ] || exit "$((code == 0 ? 1 : code))"
