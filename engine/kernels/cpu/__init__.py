"""CPU kernels in C, compiled for the machine at first use. See engine/kernels/README.md."""
