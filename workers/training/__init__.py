"""The training step: trl's SFTTrainer, read top to bottom."""
