"""ublkwatch keeps userspace block devices alive: it recovers a ublk device whose server crashed."""

__version__ = "0.1.0"
