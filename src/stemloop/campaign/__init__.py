"""The closed loop, the only room that knows all the others."""
