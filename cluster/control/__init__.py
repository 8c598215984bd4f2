"""Starts a cluster and keeps it running: registry, workers (as plain processes or Ray actors), router."""
