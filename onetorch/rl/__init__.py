"""Deep reinforcement learning: one file per algorithm, and beside them the few parts that they share."""
