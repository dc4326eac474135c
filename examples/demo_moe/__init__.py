"""The parts of `train_demo_moe.py`, in the order in which it uses them: documents, training, choices, card."""
