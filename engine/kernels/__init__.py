"""Kernels of our own, behind the same layers as the libraries' ones. They know tensors and block tables, no model."""
