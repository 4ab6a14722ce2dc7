"""Solvers of linear systems, column by column, with shared passes over the data."""
