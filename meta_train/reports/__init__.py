"""Figures and pages, drawn from what runs and benchmarks have left."""
