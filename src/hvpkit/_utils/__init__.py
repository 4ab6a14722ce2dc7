"""Shared helpers without a subject of their own: argument checks, files, memory, random vectors."""
