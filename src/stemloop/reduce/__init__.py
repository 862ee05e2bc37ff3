"""Frames to numbers and maps."""
