"""Training with trl's SFTTrainer; start reading in train.py."""
