"""Runs kernels written for `mx.fast.cuda_kernel` on a Linux CPU: CUDA's words on the runtime of tests/metalsim."""

from .fixture import Cuda, cuda
from .kernel import CudaKernel, CudaSimulator

__all__ = ["Cuda", "CudaKernel", "CudaSimulator", "cuda"]
