"""Structure to energy, by real calculators."""
