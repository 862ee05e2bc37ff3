"""How columns are found and fitted: the rooms behind ``atoms`` and ``network``."""
