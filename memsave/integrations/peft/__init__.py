"""memsave's adapters as PEFT tuners; importing this package makes them known to PEFT."""

from .files import export, load_adapter
from .shira import SHiRAConfig
from .shira import SHiRAConfig as LaMDAConfig
from .shira.fusing import adapter_overlap, fuse_adapters

__all__ = ["LaMDAConfig", "SHiRAConfig", "adapter_overlap", "export", "fuse_adapters", "load_adapter"]
