"""Minimal reinforcement-learning loops for language models, built on rlkern's operators."""
