"""Turns logits into tokens: counter-based noise, filters, penalties and logprobs, on the device, without host sync."""
