"""Meta-training: tasks, unrolls, gradient estimators and the trainer that produces new update rules."""
