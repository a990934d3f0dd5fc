#!/bin/bash
# The servers of one node: server.sh rollout | retriever. The first that ends ends all. Rendered by `sd-search launch`.
trap '' USR1 # meant for the ranks; a server would die of it
cd @directory@ || exit
@setup@
case $1 in
rollout)
    for ((number = 0; number < SERVERS_PER_NODE; number++)); do
        first=$((number * @tensor_parallel_size@))
        CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + @tensor_parallel_size@ - 1))) \
            @python@ -m launch.cli vllm serve --config=@launch_dir@/config.yaml \
            --host 0.0.0.0 --port $((@vllm_port@ + number)) @cpu@ &
    done
    ;;
retriever)
    @python@ -m launch.cli retriever serve --corpus=@corpus@ \
        --host=0.0.0.0 --port=@retriever_port@ --token_file=@launch_dir@/retriever.token &
    ;;
esac
trap 'kill $(jobs -p); exit' TERM INT
wait -n
code=$?
# shellcheck disable=SC2046
kill $(jobs -p) 2>/dev/null
exit "$code"
