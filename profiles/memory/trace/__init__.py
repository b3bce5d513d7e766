"""Record training steps on torch's meta device."""
