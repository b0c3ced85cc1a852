"""Benches: one file a question, each against a reference in C. ``python benches/run.py --list``."""
