"""`python -m kernels.bench`: the backends of one operation timed side by side in one run."""
