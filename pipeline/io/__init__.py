"""Where rows come from and go to: arrays, batches, files, and the registry of formats."""
