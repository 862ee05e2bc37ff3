"""Frames in motion: packets, channels, the durable landing log."""
