#!/bin/bash
# Are this job's nodes fit for the run? One task a node; fails when one is not, and names it. Rendered by `sd-search launch`.
trap '' USR1
cd @directory@ || exit
@setup@
[ -z "${ATTEMPT_ENV:-}" ] || source "$ATTEMPT_ENV"
hosts=$(tr '\n' ',' < "$ATTEMPT_DIR/nodes.txt")
number=$(awk -v host="${SLURMD_NODENAME:-${1:-localhost}}" '$1 == host { print NR - 1 }' "$ATTEMPT_DIR/nodes.txt")
# Room for the checkpoints still to come: those that are kept and the one being written, less those that are there.
to_come=$((@num_checkpoints@ - $(find @checkpoints@ -maxdepth 1 -name 'step_*' 2> /dev/null | wc -l)))
room=$((@checkpoint_gib@ * (to_come > 1 ? to_come : 1)))
exec @python@ -m launch.doctor.checks --run_dir="$ATTEMPT_DIR" --hosts="[${hosts%,}]" --number="$number" --endpoints=@endpoints@ \
    --address="$FIRST_ADDR:$((MASTER_PORT + 100))" --gpus_per_node=@gpus_wanted@ --min_free_gib=$((room > 10 ? room : 10))
