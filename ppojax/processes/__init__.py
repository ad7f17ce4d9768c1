"""Runs of many processes: who they are, how they meet, and what they tell each other on the host."""
