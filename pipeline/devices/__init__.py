"""Where the layer runs: a small protocol (`base`) and three devices behind it: `cpu`, `cuda`, `sim`."""
