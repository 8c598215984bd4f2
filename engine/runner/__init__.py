"""Executes scheduled batches: persistent rows on the device, the model's forward pass, sampling."""
