"""Understudy: the server and the vocabulary it shares with the workers."""
