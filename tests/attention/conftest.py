"""The simulated card and the fixture that runs a test with the kernels of both kinds of GPU."""

from cudasim.fixture import cuda as cuda
from helpers.gpu import gpu as gpu
