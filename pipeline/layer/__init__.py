"""The fused layer: its formula and reference, its checks, and one batch of it on the CPU or a GPU."""
