"""Operations on the vocabulary axis. `build_info()` says what native code this installation has."""

from megatron_sd.ops.native.cpu_library import BuildInfo, build_info

__all__ = ["BuildInfo", "build_info"]
