"""How rows get from the host's memory or files to a device and back: pinned rings, copy workers, movers."""
