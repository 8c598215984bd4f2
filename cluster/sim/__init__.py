"""The cluster on a virtual clock in one thread: real decisions, real schedulers, the exact fake model, made-up time."""
