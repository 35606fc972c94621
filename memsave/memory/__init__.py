"""Measuring memory: bytes kept for backward, and the peak of a real or predicted step by category, module and time."""

from .estimating import estimate
from .measuring import measure
from .oom import OOMReport, oom_report
from .profile import MemoryProfile, Timeline
from .saved import saved_bytes

__all__ = ["MemoryProfile", "OOMReport", "Timeline", "estimate", "measure", "oom_report", "saved_bytes"]
