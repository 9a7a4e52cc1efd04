"""Read a plan chunk by chunk; write nothing."""
