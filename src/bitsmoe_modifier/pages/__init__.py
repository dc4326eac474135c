"""What a person looks at: self-contained HTML pages about comparisons and checkpoints, no scripts, no network.

In: the figures of a comparison or a checkpoint. Out: HTML, SVG, sentences.
May import: checkpoints and what these may import.
"""
