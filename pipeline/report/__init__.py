"""What a run did: its record as figures, timelines, traces and pictures."""
