"""Recording a training step on the meta device."""
