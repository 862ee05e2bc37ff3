"""Networks and how they are trained and exported; the only home of torch."""
