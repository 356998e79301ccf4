"""The primitives as Triton kernels, for NVIDIA and AMD GPUs. :mod:`.table` describes the arguments of a launch."""
