"""Running attempts: in Ray actors, in this process's children, and following them."""
