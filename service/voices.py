"""The built-in voices. How a voice sounds is its engine's business."""

from __future__ import annotations

from types import MappingProxyType

DEFAULT_VOICE = "female1"

VOICES = MappingProxyType(
    {
        "female1": "a woman, clear and calm",
        "female2": "a woman, lighter and quicker",
        "male1": "a man, even and warm",
        "male2": "a man, deeper and slower",
    }
)
"""Name → description, in the order of the names."""
