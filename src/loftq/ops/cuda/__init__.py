"""Products from packed bytes in CUDA C++, compiled at first use; needs NVRTC and an NVIDIA GPU."""
