"""KV memory: its layout, who owns each block, and which blocks hold which tokens."""
