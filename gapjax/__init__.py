"""gapjax: where position hides after global average pooling, in JAX/Flax.

Islam*, Kowal*, Jia, Derpanis, Bruce: *Global Pooling, More than Meets the Eye: Position Information
is Encoded Channel-Wise in CNNs*, ICCV 2021, arXiv 2108.07884.
"""

__version__ = '0.1.0'
