#!/bin/bash
# The ranks of one node under DeepSpeed's launcher: node.sh NODE_RANK, or under srun node.sh alone. Rendered by `sd-search launch`.
# DeepSpeed's launcher would die of SIGUSR1, which is meant for the ranks: it ignores it, and the ranks set their own handler.
trap '' USR1
cd @directory@ || exit
@setup@
[ -z "${ATTEMPT_ENV:-}" ] || source "$ATTEMPT_ENV"
node_rank=${1:-$(awk -v host="$SLURMD_NODENAME" '$1 == host { print NR - 1 }' "$ATTEMPT_DIR/hostfile")}
echo $$ > "$ATTEMPT_DIR/node-$node_rank.pid"
mapfile -t arguments < "$ATTEMPT_DIR/arguments"
exec @python@ -m deepspeed.launcher.runner --hostfile "$ATTEMPT_DIR/hostfile" --no_ssh --node_rank "$node_rank" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --log_level error --no_local_rank \
    --module @module@ --config=@launch_dir@/config.yaml "${arguments[@]}"
