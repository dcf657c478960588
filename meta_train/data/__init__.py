"""Data sets: downloads, and their reading in fixed splits."""
