"""Neural style transfer."""
