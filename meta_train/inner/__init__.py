"""Inner training: many optimizees side by side, and what is recorded of them."""
