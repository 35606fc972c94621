"""memsave's adapters for PEFT. Importing this makes them known to PEFT, so that it can load their checkpoints."""

from .integrations.peft import *  # noqa: F403
from .integrations.peft import __all__ as __all__
