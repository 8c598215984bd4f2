"""The model that the package carries: what is served, asked and tested where no other is named."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_CHECKPOINT = Path(__file__).parent / "neap-tiny"  # HF `-PT` layout; README.md says what it can do
