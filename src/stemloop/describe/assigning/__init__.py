"""How columns come to belong to a lattice: the rooms behind ``lattices``."""
