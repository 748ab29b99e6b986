"""The definitions, in readable eager PyTorch: truth, baseline and fallback.

A kernel is tested against the function here that carries its name, in float64.
"""
