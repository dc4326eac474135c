"""What one checkpoint is and becomes: description, model card, plan before a run, export, import.

In: a checkpoint's folder, or a model and a recipe. Out: figures about it, or another checkpoint.
May import: evaluation and what that may import.
"""
