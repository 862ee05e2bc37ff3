"""Frames in motion: packets, channels, the durable landing log."""

from stemloop.stream.channel import Receiver, Sender
from stemloop.stream.landing import LandingLog

__all__ = ["LandingLog", "Receiver", "Sender"]
