"""Experiments on paired seeds, their statistics, tables and pages."""
