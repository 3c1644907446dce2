"""Measurements on runtime sessions, and the report made from them."""
