"""Talking to workers: clients, the link, and the only place where protobuf meets our types."""
