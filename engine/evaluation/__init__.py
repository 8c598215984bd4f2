"""The embedded model's held-out questions, asked of any model: what came back, and how much of it was right."""
