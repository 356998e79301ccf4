"""The primitives as Triton kernels, for NVIDIA and AMD GPUs. What a launch gets is described in :mod:`.table`."""
