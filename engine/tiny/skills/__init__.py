"""What the embedded model is taught and asked: examples by skill, English and Chinese, made by programs (no torch)."""

from engine.tiny.skills.checks import contains_answer, is_correct
from engine.tiny.skills.example import Example
from engine.tiny.skills.mix import SKILLS, TRAINING_MIX, held_out, training_examples
from engine.tiny.skills.rendering import CHAT_TEMPLATE, own_template, prompt_text, segments

__all__ = [
    "CHAT_TEMPLATE",
    "SKILLS",
    "TRAINING_MIX",
    "Example",
    "contains_answer",
    "held_out",
    "is_correct",
    "own_template",
    "prompt_text",
    "segments",
    "training_examples",
]
