"""Reinforcement learning of language models in which no token loses its gradient (CISPO)."""
