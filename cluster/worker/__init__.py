"""A worker: the network process, its rank process, and the state machines of both roles."""
