"""Slow, obvious float64 restatements of the papers. The package never imports them."""
