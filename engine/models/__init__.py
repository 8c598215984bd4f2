"""The models: their configuration, their weights, and one file per model type, read top to bottom."""
