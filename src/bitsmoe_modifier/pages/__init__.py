"""Self-contained HTML pages about comparisons and checkpoints: one file each, no scripts, no network."""
