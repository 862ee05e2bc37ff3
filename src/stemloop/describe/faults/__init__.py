"""How dislocations and boundaries are told: the rooms behind ``defects``."""
