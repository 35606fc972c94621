"""memsave's adapters for PEFT. Importing this makes them known to PEFT, so that it can load their checkpoints."""

from .integrations.peft import (
    LaMDAConfig,
    SHiRAConfig,
    adapter_overlap,
    export,
    fuse_adapters,
    load_adapter,
)

__all__ = [
    "LaMDAConfig",
    "SHiRAConfig",
    "adapter_overlap",
    "export",
    "fuse_adapters",
    "load_adapter",
]
