"""Few-shot learning: starting points, rates and rules from which a learner adapts to a new task in a few steps."""
