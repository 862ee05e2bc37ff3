"""Kept and found: vendor files read safely, sealed open files."""
