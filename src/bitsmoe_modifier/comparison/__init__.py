"""Recipes side by side: every stage of a recipe in a process of its own, one report.

In: a model, a recipe, text. Out: a folder of checkpoints and a report.
May import: pages, checkpoints and what these may import.
"""
