"""Fused kernels for CUDA devices and the CPU; the eager code of the models is the truth they are tested against.

Importing this package needs neither Triton nor a device. :mod:`backbones.kernels.choice` says which form runs.
"""
