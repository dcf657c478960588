"""Configurations of meta-training."""
