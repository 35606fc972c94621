"""Measuring memory: bytes kept for backward, and the peak of a real run by category, module and time."""

from .measuring import measure
from .profile import MemoryProfile, Timeline
from .saved import saved_bytes

__all__ = ["MemoryProfile", "Timeline", "measure", "saved_bytes"]
