"""What a workload would reach on given hardware."""
