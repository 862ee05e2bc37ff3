"""Frames in motion: packets, channels, the durable landing log, folds of a running stream."""

from stemloop.stream import cut
from stemloop.stream.channel import Receiver, Sender
from stemloop.stream.keys import Keys
from stemloop.stream.landing import LandingLog
from stemloop.stream.live import Live, Unkept

__all__ = ["Keys", "LandingLog", "Live", "Receiver", "Sender", "Unkept", "cut"]
