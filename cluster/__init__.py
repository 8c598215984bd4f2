"""Everything between processes: router, workers, transfer, registry, control, command line."""
