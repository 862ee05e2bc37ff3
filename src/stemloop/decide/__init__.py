"""Belief to the next action: Gaussian processes, acquisition, stop rules."""
