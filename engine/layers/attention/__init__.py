"""Attention: the one place that gathers KV, and the one op that serves prefill and decode rows alike."""
