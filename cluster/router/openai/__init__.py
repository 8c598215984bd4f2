"""The OpenAI-style surface: request models, their checks, and error bodies."""
