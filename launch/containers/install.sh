#!/bin/bash
# What both images install: `install.sh system` (packages, torch), then, with the sources in place,
# `install.sh project`. TORCH: torch, in pip's words. EXTRAS: extras of the project, commas between them, such
# as vllm,wandb; or none.
set -euo pipefail

case "${1:-nothing}" in
system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # g++ also at run time: triton and DeepSpeed compile; ssh: launches over a hostfile
    apt-get install -y --no-install-recommends ca-certificates g++ git make openssh-client \
        python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    python3 -m venv /opt/venv
    # first and alone, as `make` does it, so that a CPU build that pip can see is taken
    read -ra words <<< "${TORCH:?expected such as torch==2.13.0}"
    /opt/venv/bin/pip install --no-cache-dir "${words[@]}"
    ;;
project)
    extras=""
    [ "${EXTRAS:?expected such as vllm,wandb, or none}" = none ] || extras="[$EXTRAS]"
    /opt/venv/bin/pip install --no-cache-dir --editable "/opt/megatron_sd$extras"
    /opt/venv/bin/sd-search --version
    ;;
*)
    echo "install.sh: found ${1:-nothing}, expected system or project" >&2
    exit 2
    ;;
esac
