"""What this machine's copies reach, and what is chosen from that."""
