"""The LightningModule, its optimizer and schedule, metrics, and the callbacks around training steps."""
