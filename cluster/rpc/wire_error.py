"""What is wrong with a message, whatever it was."""

from __future__ import annotations


class WireError(ValueError):
    """A peer sent something that this program would never send."""
