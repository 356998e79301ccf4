"""Measure cheaper ascents on small tasks: accuracy and flatness against gradients and time."""
