"""Triton kernels of gam_fast, installed as ``gam_fast.kernels``. This version has none yet."""
