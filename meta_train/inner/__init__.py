"""Inner training: many optimizees side by side, and what is recorded of them.

``unroll`` is the loop of inner steps, which evaluation and all gradient estimators share.
"""
