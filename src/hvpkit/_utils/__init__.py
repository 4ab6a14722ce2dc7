"""Helpers that belong to no subject: checks of arguments, files, memory, random vectors."""
