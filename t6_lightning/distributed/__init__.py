"""Several devices: what ranks tell each other, signals, how ranks are started, FSDP2."""
