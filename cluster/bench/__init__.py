"""Load for a router and figures for people: time to first token, time per token, tokens per second."""
