"""Figures of trained models and of caches: perplexity on files, key/value memory."""
