"""llm-compressor's side: `BitsMoEModifier`, what it surveys, and one whole run of `oneshot`.

In: a dense model, a recipe and calibration rows. Out: a checkpoint in its folder.
May import: loading, sources, runtime, method, storage.
"""
