"""Mixture of experts: router, dispatch, experts, combine. No step of it waits for the device."""
