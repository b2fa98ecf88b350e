"""What every op shares. Nothing here knows an op by name, and nothing here imports torch or jax
before a function that needs it is called.

Reading order: ``problem`` (the nouns), ``registry`` (ops are folders), ``device`` (facts),
``dispatch`` (who runs, and why), ``records`` (what tuning remembers), ``usage`` (what ran), then
the workshop: ``roofline``, ``ahead_of_time``, ``measure``, ``tuner``, ``testing``, ``pallas``.
``activations`` and ``dropout`` say in NumPy what kernels share; ``torch_functions``,
``jax_functions`` and ``triton_functions``, imported by ops alone, say it in their framework.
"""
