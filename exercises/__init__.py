"""Exercises: functions of the project to write anew, see __main__.py."""
