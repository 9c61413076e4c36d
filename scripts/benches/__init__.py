"""What `scripts/bench` and `scripts/capture` measure. A bench is a `Case` (case.py) in a file of its own; what several
share lies once in common, layers, turns, ceilings and bursts."""
