"""Assignments for a course; grade.py grades a folder of them. The project imports nothing from here."""
