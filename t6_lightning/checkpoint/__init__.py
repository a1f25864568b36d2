"""Checkpoints: files that are whole or not there, shards, reading a trained model, other formats."""
