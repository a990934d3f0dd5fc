"""The door of `sd-search sft`: the trainer's own loop on stored episodes, by the likelihood of what the
policy sampled in them.

    python -m megatron_sd.sft --model.path DIR --episodes EPISODES --run_dir RUN

With `--eval.questions FILE` and sections retriever, protocol and rollout it answers questions on the way.
The model directory of the last checkpoint (adapters merged) is what `gate`, `train` and `eval` start from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_sd.config import Config
from megatron_sd.sft_config import load
from megatron_sd.train import run_door, train_run

if TYPE_CHECKING:
    from megatron_sd.distributed.control import StopRequest
    from megatron_sd.distributed.world import World
    from megatron_sd.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Train one run; the exit code is that of `sd-search train`."""
    return run_door(lambda stop: _train(argv, stop))


def _train(argv: Sequence[str], stop: StopRequest) -> int:
    own, training = load(argv)

    def build(config: Config, world: World) -> Trainer:
        # imports DeepSpeed, which must see join_world's device
        from megatron_sd.building.sft import build_sft_trainer

        return build_sft_trainer(config, own, world)

    return train_run(training, stop, build)


if __name__ == "__main__":
    from megatron_sd.distributed.world import end_process

    end_process(main(sys.argv[1:]))
