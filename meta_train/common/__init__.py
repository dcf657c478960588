"""Common ground of all rooms of meta-training: seeds, checks of settings, a user's modules, provenance."""
