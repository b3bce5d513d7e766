"""Pure decisions over the queue: order, placement, preemption, forecast, reasons."""
