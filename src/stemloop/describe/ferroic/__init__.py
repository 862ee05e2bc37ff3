"""How phases, variants, walls and vortices are told: the rooms behind ``phases`` and ``polar``."""
