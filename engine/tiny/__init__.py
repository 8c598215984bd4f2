"""Small models made on the spot: random checkpoints for tests and for serving without a model, and their tokenizer."""
