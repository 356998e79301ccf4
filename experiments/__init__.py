"""What cheaper ascents find: accuracy and flatness against gradients and time, on small tasks."""
