"""The benchmark: ublkwatch beside an oracle, and what ublkwatch costs while nothing happens."""
