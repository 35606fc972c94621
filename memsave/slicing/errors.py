"""What can go wrong before anything is changed."""

from __future__ import annotations


class CannotTrace(Exception):
    """The module's forward cannot be had as a graph; the text says why."""


class NotLocal(Exception):
    """An op cannot be computed part by part along the sliced axes; the text says why."""
