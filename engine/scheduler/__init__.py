"""Decides what each step computes: counts only, never token values, no clock, no torch."""
