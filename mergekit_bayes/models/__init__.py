"""Models and data: load, encode, place and sample."""
