"""What happens around the training steps; one short file each, and each works alone in any Trainer."""

from t6_lightning.training.callbacks.cadence import Cadence
from t6_lightning.training.callbacks.checkpoints import Checkpoints
from t6_lightning.training.callbacks.monitor import Monitor
from t6_lightning.training.callbacks.progress import TrainingProgress
from t6_lightning.training.callbacks.seeds import StepSeeds
from t6_lightning.training.callbacks.spikes import SpikeGuard

__all__ = ["Cadence", "Checkpoints", "Monitor", "SpikeGuard", "StepSeeds", "TrainingProgress"]
