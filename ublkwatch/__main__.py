"""``python -m ublkwatch``."""

from ublkwatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
