"""Benchmarks of rlkern: every figure beside its ceiling, its peers and its error."""
