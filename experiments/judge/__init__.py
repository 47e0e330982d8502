"""Records loaded as one frame, and the claims judged on it."""
