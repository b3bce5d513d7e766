"""The page: templates, a style and a script."""
