"""What happens around the training steps; one short file each."""
