"""SHiRA, sparse high rank adapters, as a PEFT tuner."""

from ..registration import register
from .config import SHiRAConfig
from .layer import SHiRALinear
from .method import SHiRAMethod
from .model import SHiRAModel

register("memsave_shira", SHiRAConfig, SHiRAModel)

__all__ = ["SHiRAConfig", "SHiRALinear", "SHiRAMethod", "SHiRAModel"]
