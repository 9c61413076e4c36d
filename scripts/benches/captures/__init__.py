"""The parts of `scripts/capture`."""
