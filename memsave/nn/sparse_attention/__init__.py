"""Sparse multi-head attention: each query attends to the keys that product quantization expects to matter.

`selecting.py` chooses the keys, `function.py` attends to them and differentiates, `codebooks.py` fits what it takes to
choose, `masks.py` reads masks of all kinds, `crossover.py` measures from which length it is faster, `state.py` is what
a converted module holds, `multihead.py` is `nn.MultiheadAttention`.
"""
