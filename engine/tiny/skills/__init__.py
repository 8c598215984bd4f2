"""What the embedded model is taught and asked: examples by skill, English and Chinese, made by programs (no torch)."""

from engine.tiny.skills.checks import contains_answer, is_correct
from engine.tiny.skills.example import MAX_PAIRS, Example
from engine.tiny.skills.mix import SKILLS, TRAINING_MIX, held_out, held_out_lookups, training_examples
from engine.tiny.skills.rendering import CHAT_TEMPLATE, own_template, prompt_text, segments

__all__ = [
    "CHAT_TEMPLATE",
    "MAX_PAIRS",
    "SKILLS",
    "TRAINING_MIX",
    "Example",
    "contains_answer",
    "held_out",
    "held_out_lookups",
    "is_correct",
    "own_template",
    "prompt_text",
    "segments",
    "training_examples",
]
