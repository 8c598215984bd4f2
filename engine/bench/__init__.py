"""Measures one engine on this machine, alone or beside transformers; `neap bench engine` is its command."""
