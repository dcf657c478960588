"""What every room of meta-training uses: seeds, checks of settings, a user's modules, provenance."""
