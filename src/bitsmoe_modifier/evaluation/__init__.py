"""How far a model is from another: divergences on text, accuracy on tasks.

In: a loaded model, the reference's recorded predictions, rows and items. Out: figures with their errors.
May import: calibration, loading, sources, runtime, method, storage.
"""
