"""The rooms of :mod:`stemloop.reduce.register`, by what the frames become."""
