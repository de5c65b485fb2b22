"""Thin entry points: the quick start, the chat, the tests. Run from the root of the checkout."""
