"""Closed loop: environments, scripted experts, rollouts, small models for them, and the experiment of LAPA."""
