"""The T6 transformer in plain torch: no Lightning, no logging, no parallelism."""
