"""CUDA: a copy engine for pools in GPU memory. Nothing here is imported unless it is asked for by name.

State: the logic runs in tests against a fake device, the kernels compile for sm_80, sm_90 and sm_100, and
their arithmetic runs in tests as host code.  Nothing here has run on a GPU yet; docs/gpu.md keeps the list.
"""
