"""What is the hardware, the model, the data; what fits; how fast."""
