"""Eight CPU devices. JAX settles their number when it starts, and with several selects no kernels
on CUDA: these tests run in a process without the others, `pytest tests/sharding`.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
