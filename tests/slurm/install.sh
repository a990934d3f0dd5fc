#!/bin/bash
# SLURM's daemons from Debian's packages, for the tests of tests/slurm. Needs root.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends slurm-wlm munge
