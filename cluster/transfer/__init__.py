"""How KV bytes get from a source's blocks into a receiver's: one connector per transport, one set of checks."""
