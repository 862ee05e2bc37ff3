"""stemloop: electron microscopes that run their own experiments."""

__version__ = "0.1.0"
