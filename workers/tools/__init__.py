"""Tools that create or convert models."""
