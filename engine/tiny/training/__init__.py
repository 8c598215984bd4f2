"""Trains the embedded model: tokenizer, batches, model, optimiser, checkpoints, measures."""
