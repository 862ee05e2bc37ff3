"""Nion Swift as an instrument, and any instrument as a device in Nion Swift. Needs the extra ``nion``."""
