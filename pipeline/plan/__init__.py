"""What a job would reach on given hardware."""
