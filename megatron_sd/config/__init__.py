"""The configuration tree: every default of the library lives here, one file a section, and nowhere else.

`load.py` reads `--config FILE.yaml` and `--section.key value` overrides into a frozen `Config`; `checks.py`
says what values are in range and which go together. A typo, a wrong type, a value out of range or a missing
section is a `ConfigError` that names the key, what was found and what was expected.
"""

from megatron_sd.config.loss import (
    AdvantageConfig,
    AlphaConfig,
    CriticConfig,
    DistillConfig,
    PolicyLossConfig,
)
from megatron_sd.config.model import LoraConfig, ModelConfig
from megatron_sd.config.retriever import (
    ClientConfig,
    OpenSearchConfig,
    QdrantConfig,
    RerankConfig,
    RetrieverConfig,
    SearchConfig,
    WebSearchConfig,
)
from megatron_sd.config.rollout import (
    JudgeConfig,
    ProtocolConfig,
    RewardConfig,
    RewardJudgeConfig,
    RolloutConfig,
    ToolConfig,
    VllmConfig,
)
from megatron_sd.config.run import CheckpointConfig, Config, DataConfig, LogConfig, MixConfig, SafetyConfig
from megatron_sd.config.update import AUTO, OptimizerConfig, PublishConfig, UpdateConfig

__all__ = [
    "AUTO",
    "AdvantageConfig",
    "AlphaConfig",
    "CheckpointConfig",
    "ClientConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DistillConfig",
    "JudgeConfig",
    "LogConfig",
    "LoraConfig",
    "MixConfig",
    "ModelConfig",
    "OpenSearchConfig",
    "OptimizerConfig",
    "PolicyLossConfig",
    "ProtocolConfig",
    "PublishConfig",
    "QdrantConfig",
    "RerankConfig",
    "RetrieverConfig",
    "RewardConfig",
    "RewardJudgeConfig",
    "RolloutConfig",
    "SafetyConfig",
    "SearchConfig",
    "ToolConfig",
    "UpdateConfig",
    "VllmConfig",
    "WebSearchConfig",
]
