"""Exercises: functions of the project to implement, see __main__.py."""
