"""Runs: their folders, costs, tracking and reports, and `fit`, which trains one."""
