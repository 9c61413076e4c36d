"""Where rows come from (`sources`), where they go to (`sinks`), and the pinned memory between (`staging`)."""
